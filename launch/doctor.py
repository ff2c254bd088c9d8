"""Examines ranks, hosts, network and storage before a run: one verdict a line.

    python launch/doctor.py                                          this machine alone
    deepspeed --num_gpus 2 launch/doctor.py --config … data=DIR run=DIR
    deepspeed --hostfile HOSTS launch/doctor.py --config … data=DIR run=DIR
    torchrun --nnodes 8 --nproc-per-node 8 … launch/doctor.py --config … data=DIR run=DIR
    srun -N 8 --ntasks-per-node=8 python launch/doctor.py --config … data=DIR run=DIR
    mpirun -np 64 -x MASTER_ADDR=host0 python launch/doctor.py --config … data=DIR run=DIR
    … --json FILE                                                    all that was measured, too
    … --min-gbit 10                                                  a slower link is a fault

It is started exactly as the training would be: write `doctor` for `train` in its command, whose other
options it takes and ignores. It trains nothing, and leaves nothing in run=DIR. Without data=DIR or
run=DIR that part is left out. Exit status: 0 no fault; 2 a fault; 4 a rank did not come, or is gone.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.stack import check_stack
from launch.train import Options as TrainOptions
from trainer.config import load_config
from trainer.config.command_line import option, parse_options
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """The command line: that of the training, and what is asked of the doctor."""

    json: str | None = option(
        "JSON file that gets all that was measured", None, metavar="FILE"
    )
    wait: float = option(
        "seconds for which a rank that does not come or answer is waited for",
        60.0,
        metavar="SECONDS",
    )
    patience: float = option(
        "seconds for which a file of another host is looked for in run=DIR",
        5.0,
        metavar="SECONDS",
    )
    min_gbit: float = option(
        "the least that a link between two hosts has to have, in Gbit/s",
        1.0,
        metavar="NUMBER",
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line; what the DeepSpeed launcher appends is taken and ignored."""
    options = parse_options(Options, __doc__, arguments)
    for name in ("wait", "patience", "min_gbit"):
        value = getattr(options, name)
        if not 0 < value < 1e6:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {value}: give more than 0")
    return options


@exit_on_input_error
def main() -> None:
    """Joins the ranks, examines, prints the table."""
    options = parse()
    check_stack(options.device)
    config = load_config(
        options.config, options.settings, options.deepspeed_config
    )
    from rich.console import Console

    from trainer.distributed import process_group
    from trainer.distributed.agreement import max_of_ranks
    from trainer.doctor.examination import examine
    from trainer.doctor.judgement import judge
    from trainer.doctor.report import as_record, summary, verdict_table
    from trainer.doctor.verdict import has_fault
    from trainer.files.atomic import write_json
    from trainer.reporting.line_folding import WIDTH_IN_A_PIPE

    minutes = options.wait / 60
    with process_group.join_process_group(minutes, options.device) as ranks:
        begun = time.monotonic()
        found = examine(config, ranks, options.min_gbit, options.patience)
        verdicts = judge(found) if ranks.first else []
        # One status for all: a launcher gives that of any rank.
        failed = max_of_ranks(int(has_fault(verdicts)))
    if ranks.first:
        width = None if sys.stdout.isatty() else WIDTH_IN_A_PIPE
        Console(width=width).print(verdict_table(verdicts))
        print(summary(verdicts, time.monotonic() - begun), flush=True)
        if options.json:
            write_json(Path(options.json), as_record(found, verdicts))
    if failed:
        sys.exit(InputError.status)


if __name__ == "__main__":
    run_script(main)
