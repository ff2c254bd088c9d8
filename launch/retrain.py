"""New logs in, a new model out: extends the dataset, trains from the model that serves, compares, publishes.

    python launch/retrain.py --config retrain.yaml name=2026-11-26 'input=[logs/2026-11-26.parquet]'

For cron and its kin (launch/templates/): killed, the same command goes on; two at once do not harm each other.
Status 0: published; 3: refused, FOLDER/days/NAME/report.md says why; else the stage that failed says why.
"""

import argparse
import sys

from trainer.errors import exit_on_input_error

REFUSED = 3


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML of RetrainConfig; may be repeated",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="over the files"
    )
    return parser.parse_args(arguments)


@exit_on_input_error
def main():
    """Retrains, and says how it ended."""
    options = parse()
    from trainer.config.load import load
    from trainer.config.retraining import RetrainConfig
    from trainer.retraining.job import REPORT, retrain

    config = load(RetrainConfig, options.config, options.settings)
    result = retrain(config)
    print(
        f"{config.name}: "
        + (
            f"version {result['published']} serves"
            if result["published"]
            else "not published"
        )
    )
    for reason in result["reasons"]:
        print(f"refused: {reason}", file=sys.stderr)
    print(f"report: {config.folder}/days/{config.name}/{REPORT}")
    sys.exit(0 if result["published"] else REFUSED)


if __name__ == "__main__":
    main()
