"""This process's name in messages: its host, and its rank as far as the launcher tells it.

A message may be due before the launcher's variables were checked, or because they contradict each
other. `trainer.distributed.launchers` reads them with care. Needs nothing but Python.
"""

import os
import socket
from collections.abc import Mapping

# Of torchrun and deepspeed, Open MPI, MVAPICH, MPICH and Intel MPI, PMIx, and Slurm's srun; the
# first that is set wins.
RANK_VARIABLES = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "SLURM_PROCID",
)


def rank_for_messages(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the environment tells, 0 where it tells none.

    For messages alone: nobody may decide by it which rank does what.
    """
    for name in RANK_VARIABLES:
        value = environment.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def process_name(environment: Mapping[str, str] = os.environ) -> str:
    """`rank 3 on host7`: this process, as a message names it."""
    return f"rank {rank_for_messages(environment)} on {socket.gethostname()}"
