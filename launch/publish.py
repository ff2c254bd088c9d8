"""Publishes a finished run's model where it is not worse than the one that serves.

    python launch/publish.py --candidate runs/2 --to published     compares, exports, publishes
    python launch/publish.py --to published --rollback             back to the version before
    python launch/publish.py --to published --rollback 0003        to a certain one

published/current.json names the version that serves. Status 0: it was published; 3: it was refused,
and published/refused.json and the last lines say why.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from launch.stack import check_stack
from trainer.config import PublishConfig
from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import Device
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error

REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Options(Device):
    """The command line."""

    to: str = option("the folder of published versions", metavar="DIR")
    candidate: str | None = option(
        "the folder of a finished run", None, metavar="RUN"
    )
    data: str | None = option(
        "the candidate's dataset, where it is not where the run found it",
        None,
        metavar="DIR",
    )
    arrivals: str | None = option(
        "what `evaluate.py --split arrivals --record FILE` left: the record keeps it",
        None,
        metavar="FILE",
    )
    rollback: str | None = option(
        "make an older version the current one",
        None,
        bare="",
        metavar="VERSION",
    )
    rules: PublishConfig = option(
        "when a candidate is published", PublishConfig
    )
    json: bool = option("print one JSON line in place of the table", False)


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Compares and publishes, or goes back."""
    options = parse()
    if options.rollback is not None:
        _roll_back(options)
        return
    if not options.candidate:
        raise InputError(
            "--candidate is missing: the finished run that is to be published"
        )
    check_stack(options.device)
    from trainer.distributed import process_group
    from trainer.retraining.publish import publish

    with process_group.join_process_group(device=options.device) as ranks:
        record = publish(
            options.candidate,
            options.to,
            ranks,
            options.rules,
            options.data,
            options.arrivals,
        )
    if ranks.first:
        _print_record(options, record)
    sys.exit(0 if record["published"] else REFUSED)


def _roll_back(options: Options) -> None:
    """Makes an older version the current one."""
    from trainer.retraining.registry import roll_back

    version = roll_back(options.to, options.rollback or None)
    print(
        f"{options.to}: version {version['number']} serves, of {version['run']}"
    )


def _print_record(options: Options, record: dict) -> None:
    """Prints how the candidate compares, and whether it was published."""
    from rich.console import Console

    from trainer.reporting.command_tables import comparison_table

    if options.json:
        print(json.dumps(record))
    else:
        Console().print(comparison_table(record))
    for note in record.get("notes", []):
        print(f"not held against it: {note}", file=sys.stderr)
    for warning in record.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    if record["published"]:
        print(f"{options.to}: version {record['published']} serves")
    else:
        for reason in record["reasons"]:
            print(f"refused: {reason}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
