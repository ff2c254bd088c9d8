"""Verdicts on what an examination found. Nothing is measured here, and no ranks are needed.

    judge_ranks      on ranks and hosts, each by itself
    judge_storage    on the dataset and the run's folder
    judge_network    on clocks, links and collectives

A new check is a function in one of them, and a line in CHECKS.
"""

from collections.abc import Callable

from trainer.doctor.facts import Examination
from trainer.doctor.judge_network import (
    judge_clocks,
    judge_collective,
    judge_links,
)
from trainer.doctor.judge_ranks import (
    judge_answers,
    judge_devices,
    judge_differences,
    judge_memory,
    judge_open_files,
    judge_other_programs,
    judge_shared_memory,
)
from trainer.doctor.judge_storage import (
    judge_data,
    judge_locks,
    judge_reading,
    judge_run_folder,
)
from trainer.doctor.verdict import Check, Verdict

# In the order in which a table shows them.
CHECKS: dict[str, Callable[[Check, Examination], str]] = {
    "ranks": judge_answers,
    "same everywhere": judge_differences,
    "devices": judge_devices,
    "other programs": judge_other_programs,
    "memory": judge_memory,
    "shared memory": judge_shared_memory,
    "open files": judge_open_files,
    "clocks": judge_clocks,
    "data": judge_data,
    "run's folder": judge_run_folder,
    "locks": judge_locks,
    "shards read": judge_reading,
    "links": judge_links,
    "all-reduce": judge_collective,
    "all-to-all": judge_collective,
}


def judge(found: Examination) -> list[Verdict]:
    """One verdict or more for every check."""
    verdicts: list[Verdict] = []
    for name, look in CHECKS.items():
        check = Check(name)
        finding = look(check, found)
        verdicts += check.conclude(finding)
    return verdicts
