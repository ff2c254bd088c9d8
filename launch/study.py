"""Trains and compares SyNCRec, its ablations and baselines on one's own prepared data.

    python launch/study.py --data DIR --output DIR --base default
    … --config STUDY.yaml                     the study's own settings (trainer/study/plan.py)
    … seeds=[0,1,2] parallel=2                the same as key=value
    … 'settings=[epochs=10]'                  settings of all runs, over the base
    … 'tune={model.dropout: [0.2, 0.5]}'      every system tries these, its best counts
    … 'recbole={BPR: {}, NARM: {}}'           models of RecBole beside them (make peers)

Systems: SyNCRec; w/o LC-NTG, SC-MIM, stop-gradient; SDSR (each domain alone); CDSR; MMoE; CGRec;
SASRec; GRU4Rec; popularity. Killed or stopped, the same command goes on; what is done stays done.
Exit status 1: runs failed, and the report is of the others.
"""

from trainer.interrupts import begin_work, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.stack import check_stack
from trainer.config import load_config
from trainer.config.command_line import option, parse_options
from trainer.config.load import find_config, load_settings
from trainer.config.study import StudyConfig
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    data: str = option("the prepared dataset", metavar="DIR")
    output: str = option(
        "the study's folder: new, or of the same study", metavar="DIR"
    )
    base: list[str] = option(
        "a run's YAML or preset; given again: over the one before",
        list,
        repeat=True,
        metavar="NAME|FILE",
    )
    config: list[str] = option(
        "the study's YAML; given again: over the one before",
        list,
        repeat=True,
        metavar="FILE",
    )
    recbole_python: str | None = option(
        "the Python that has RecBole; without it: what `make peers` makes",
        None,
        metavar="FILE",
    )
    settings: list[str] = option(
        "settings of the study, listed below", list, settings_of=StudyConfig
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Runs the study and writes its report."""
    check_stack()
    options = parse()
    from trainer.study.report import write_study
    from trainer.study.runner import run_study

    begin_work()
    config = load_settings(StudyConfig, options.config, options.settings)
    load_config(options.base, config.settings)  # raises before anything runs
    base = [find_config(file).resolve() for file in options.base]
    output = Path(options.output)
    scripts = Path(__file__).resolve().parent
    study = run_study(
        options.data, output, base, config, scripts, options.recbole_python
    )
    print(f"report: {write_study(output, study)}")
    if study.failed:
        sys.exit(
            f"error: {len(study.failed)} runs failed, which the report names; the same "
            "command tries them again"
        )


if __name__ == "__main__":
    run_script(main, goes_on=True)
