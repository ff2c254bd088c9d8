import socket

import pytest

from trainer.distributed import launchers
from trainer.process_name import RANK_VARIABLES, process_name, rank_for_messages


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "a"}, 0),
        ({"RANK": "a", "SLURM_PROCID": "4"}, 4),
        ({"RANK": "9", "SLURM_PROCID": "4"}, 9),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 1),
    ],
)
def test_a_message_names_a_rank_whatever_the_environment_says(
    environment, rank
):
    assert rank_for_messages(environment) == rank
    assert process_name(environment) == f"rank {rank} on {socket.gethostname()}"


def test_the_rank_of_every_launcher_is_known():
    for launcher in (
        launchers._OPEN_MPI,
        launchers._MVAPICH,
        launchers._PMI,
        launchers._SLURM,
    ):
        assert launcher.rank in RANK_VARIABLES
