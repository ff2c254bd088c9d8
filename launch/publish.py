"""Publishes a finished run's model where it is not worse than the one that serves.

    python launch/publish.py --candidate runs/2 --to published       compares, exports, and points published/current.json to it
    python launch/publish.py --to published --rollback               back to the version before
    python launch/publish.py --to published --rollback 0003          to a certain one

Status 0: it was published; 3: it was refused, and published/refused.json and the last lines say why.
"""

import argparse
import json
import sys

from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error

REFUSED = 3


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--candidate", metavar="RUN", help="the folder of a finished run"
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="the folder of published versions"
    )
    parser.add_argument(
        "--data", help="the candidate's dataset, where it is not where the run found it"
    )
    parser.add_argument(
        "--rollback",
        nargs="?",
        const="",
        metavar="VERSION",
        help="make an older version the current one",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="a domain may lack it (%(default)s)",
    )
    parser.add_argument(
        "--fall",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="that the mean may fall (%(default)s)",
    )
    parser.add_argument(
        "--domain-fall",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="that a domain may fall (%(default)s)",
    )
    parser.add_argument(
        "--own-fall",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of what own items gain (%(default)s)",
    )
    parser.add_argument(
        "--least-users",
        type=int,
        default=100,
        metavar="N",
        help="to judge a domain by its newest users",
    )
    parser.add_argument(
        "--keep", type=int, default=5, metavar="N", help="older versions that stay"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "fp16"], default="fp32", help="of the item vectors"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line in place of the table"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def table_of(record):
    """The figures by domain."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("domain", title="NDCG@10 on the newest held-out items")
    shown = ("candidate", "current", "when_published")
    for column in ("users", *shown):
        table.add_column(column.replace("_", " "), justify="right")
    for name, figures in record["domains"].items():
        numbers = (
            "–" if figures[which] is None else f"{figures[which]:.4f}"
            for which in shown
        )
        table.add_row(
            escape(name),
            f"{figures['users']:,}{'' if figures['newest'] else ' (all)'}",
            *numbers,
        )
    return table


@exit_on_input_error
def main():
    """Compares and publishes, or goes back."""
    options = parse()
    if options.rollback is not None:
        from trainer.retraining.publish import roll_back

        version = roll_back(options.to, options.rollback or None)
        print(f"{options.to}: version {version['number']} serves, of {version['run']}")
        return
    if not options.candidate:
        raise InputError(
            "--candidate is missing: the finished run that is to be published"
        )
    check_stack()
    from rich.console import Console

    from trainer.config.retraining import PublishConfig
    from trainer.distributed import process_group
    from trainer.retraining.publish import publish

    falls = options.fall, options.domain_fall, options.own_fall
    config = PublishConfig(
        options.tolerance, *falls, options.least_users, options.keep, options.dtype
    )
    with process_group.joined() as ranks:
        record = publish(options.candidate, options.to, ranks, config, options.data)
    if not ranks.first:
        sys.exit(0 if record["published"] else REFUSED)
    print(json.dumps(record)) if options.json else Console().print(table_of(record))
    if record["published"]:
        print(f"{options.to}: version {record['published']} serves")
        return
    for reason in record["reasons"]:
        print(f"refused: {reason}", file=sys.stderr)
    sys.exit(REFUSED)


if __name__ == "__main__":
    run_script(main)
