"""New logs in, a new model out: extends the dataset, trains, compares, publishes.

    python launch/retrain.py --config retrain.yaml name=2026-11-26 'input=[logs/2026-11-26.parquet]'

The model that serves first ranks all new events, then training begins with it (warm start).
For cron and its kin (launch/templates/):
killed, the same command goes on; two at once do not harm each other. Status 0: published;
3: refused, FOLDER/days/NAME/report.md says why; else the stage that failed says why. A refused
day's logs come along with the next day; `leave_out=[NAME]` leaves them out.
"""

from trainer.interrupts import begin_work, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from launch import train
from trainer.config import RetrainConfig, load_config
from trainer.config.command_line import option, parse_options
from trainer.config.load import load_settings
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error

REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    config: list[str] = option(
        "YAML of the settings; given again: over the one before",
        list,
        repeat=True,
        metavar="FILE",
    )
    settings: list[str] = option(
        "settings, listed below, over the files",
        list,
        settings_of=RetrainConfig,
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Retrains, and says how it ended."""
    options = parse()
    from trainer.retraining.changes_report import after_refusal
    from trainer.retraining.day import REPORT
    from trainer.retraining.job import retrain

    begin_work()
    config = load_settings(RetrainConfig, options.config, options.settings)
    _check_training(config)
    result = retrain(config)
    if result["published"]:
        print(f"{config.name}: version {result['published']} serves")
    else:
        print(f"{config.name}: not published")
    for note in result.get("notes", []):
        print(f"not held against it: {note}", file=sys.stderr)
    for warning in result.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    for reason in result["reasons"]:
        print(f"refused: {reason}", file=sys.stderr)
    if not result["published"]:
        print(after_refusal(config.name), file=sys.stderr)
    print(f"report: {config.folder}/days/{config.name}/{REPORT}")
    sys.exit(0 if result["published"] else REFUSED)


def _check_training(config: RetrainConfig) -> None:
    """Raises InputError for settings of training that cannot be used, before a dataset is made."""
    files = [f"--config={file}" for file in config.base]
    words = [*files, *config.settings, *config.warm_settings]
    options = train.parse(words)
    run = load_config(
        options.config, options.settings, options.deepspeed_config
    )
    if run.split.kind != "leave_one_out":
        raise InputError(
            f"split.kind is {run.split.kind}: a retraining learns from the newest days too, and is "
            "judged by leave-one-out: leave the setting out"
        )


if __name__ == "__main__":
    run_script(main, goes_on=True)
