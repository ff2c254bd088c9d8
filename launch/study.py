"""Trains and compares SyNCRec, its variants and its opponents on one's own prepared data: who gains, and who loses.

    python launch/study.py --data DIR --output DIR --base launch/configs/default.yaml
    … --config STUDY.yaml                     the study's own settings (trainer/study/plan.py)
    … seeds=[0,1,2] parallel=2                the same as key=value
    … 'settings=[epochs=10]'                  settings of all runs, over the base
    … 'tune={model.dropout: [0.2, 0.5]}'      every system tries these, the best by validation stands for it
    … 'recbole={BPR: {}, NARM: {}}'           models of RecBole beside them (make peers)

Systems: SyNCRec; w/o LC-NTG, SC-MIM, stop-gradient; SDSR (each domain alone); CDSR; MMoE; CGRec; SASRec; GRU4Rec; popularity.
Killed or stopped, the same command goes on; what is done stays done. Exit status 1: runs failed, the report is of the others.
"""

import argparse
import sys
from pathlib import Path

from launch.stack import check_stack
from trainer.errors import exit_on_input_error


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the prepared dataset")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="the study's folder: new, or of the same study",
    )
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        help="a run's YAML; given again: over the one before",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="the study's YAML; given again: over the one before",
    )
    parser.add_argument(
        "--recbole-python",
        help="the Python that has RecBole (default: what `make peers` makes)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


@exit_on_input_error
def main():
    """Runs the study and writes its report."""
    check_stack()
    options = parse()
    from trainer.config.load import load, load_config
    from trainer.study.plan import StudyConfig
    from trainer.study.report import write_study
    from trainer.study.runner import run_study

    config = load(StudyConfig, options.config, options.settings)
    load_config(
        options.base, config.settings
    )  # what is wrong in them is said before anything runs
    base = [Path(file).resolve() for file in options.base]
    here = Path(__file__).resolve().parent
    study = run_study(
        options.data, options.output, base, config, here, options.recbole_python
    )
    print(f"report: {write_study(options.output, study)}")
    if study.failed:
        sys.exit(
            f"error: {len(study.failed)} runs failed, which the report names; the same command tries them again"
        )


if __name__ == "__main__":
    main()
