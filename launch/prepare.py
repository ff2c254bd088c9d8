"""Prepares interaction logs for training: Parquet, CSV or TSV (also .gz) in, a folder of shards and vocabularies out.

    python launch/prepare.py --input logs/ more.csv 'days/2024-*.parquet' --output data/shop

Every row of the logs is one interaction: user, item, domain, time. `--domain NAME` stands for a missing domain column.
What does not fit into --memory goes beside the output. Killed, the same command goes on from the stages that were finished.

    python launch/prepare.py --input logs/ --output data/1 --keep-log
    python launch/prepare.py --input logs/2026-11-26.parquet --extend data/1 --output data/2

brings new logs onto a dataset: items keep their rows of the item matrix, new ones take what was kept for later ones.
"""

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.data.format.dataset import Dataset
from trainer.data.prepare.extend import UNITS, options_of
from trainer.data.prepare.pipeline import PrepareConfig, prepare
from trainer.data.prepare.shard_writing import PERCENTILES
from trainer.errors import InputError, exit_on_input_error


def parse_arguments() -> tuple[str, PrepareConfig, bool]:
    """The engine, what to prepare, and whether to begin anew."""
    default = PrepareConfig(inputs=(), output="")
    inherited = "; that of the extended dataset"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or globs",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet or is empty",
    )
    for role in ("user", "item", "domain", "time"):
        parser.add_argument(
            f"--{role}-column",
            default=getattr(default, f"{role}_column"),
            metavar="NAME",
        )
    parser.add_argument(
        "--domain",
        metavar="NAME",
        help="the one domain of logs without a domain column",
    )
    parser.add_argument(
        "--extend", metavar="DIR", help="the dataset onto which these logs come"
    )
    parser.add_argument(
        "--keep-log",
        action="store_true",
        help="keep the log in the dataset, so that it can be extended",
    )
    parser.add_argument(
        "--whole-log",
        action="store_true",
        help="these logs are all, in place of the kept one",
    )
    parser.add_argument(
        "--since",
        metavar="TIME",
        help="leave out what is older, a time as the logs have it",
    )
    parser.add_argument(
        "--days",
        type=float,
        metavar="N",
        help="leave out what is older than N days before the newest row",
    )
    parser.add_argument(
        "--time-unit", choices=list(UNITS), help="of times that are numbers, for --days"
    )
    parser.add_argument(
        "--retire",
        action="store_true",
        help="items without an event left give up their rows",
    )
    parser.add_argument(
        "--min-user",
        type=int,
        metavar="N",
        help=f"drop users with fewer interactions (default: 0{inherited})",
    )
    parser.add_argument(
        "--min-item",
        type=int,
        metavar="N",
        help=f"drop items with fewer interactions (default: 0{inherited})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help=f"of the shuffle of users (default: {default.seed}{inherited})",
    )
    of_ranks = f"at least as many as ranks, best a multiple of them (default: {default.streams}{inherited})"
    parser.add_argument("--streams", type=int, metavar="N", help=of_ranks)
    parser.add_argument(
        "--shard-users",
        type=int,
        default=default.shard_users,
        help="most users in a shard",
    )
    parser.add_argument(
        "--block-users",
        type=int,
        default=default.block_users,
        help="most users in a block of a shard",
    )
    parser.add_argument(
        "--memory",
        default=default.memory,
        help="of all processes together, kept (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=default.processes,
        metavar="N",
        help="0: one a core",
    )
    parser.add_argument(
        "--engine",
        choices=["duckdb", "spark"],
        default="duckdb",
        help="spark: the session of spark-submit",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew where an earlier call was killed",
    )
    arguments = vars(parser.parse_args())
    inputs, engine, fresh = (
        tuple(arguments.pop("input")),
        arguments.pop("engine"),
        arguments.pop("fresh"),
    )
    if engine == "spark" and (
        arguments["extend"]
        or arguments["keep_log"]
        or arguments["since"]
        or arguments["days"]
    ):
        raise InputError(
            "--engine spark prepares whole logs: --extend, --keep-log and windows are DuckDB's"
        )
    options = {} if arguments["extend"] is None else options_of(arguments["extend"])
    options |= {name: value for name, value in arguments.items() if value is not None}
    return engine, PrepareConfig(inputs=inputs, **options), fresh


def summary(dataset: Dataset) -> Table:
    title = f"{escape(str(dataset.folder))}: {dataset.users:,} users in {len(dataset.shards)} shards, {dataset.streams} streams"
    caption = (
        f"{', '.join(PERCENTILES)}: interactions of a user in the domain. {dataset.too_short:,} users are too short to be "
        f"evaluated, the longest has {dataset.max_length:,} interactions"
    )
    table = Table("domain", title=title, caption=caption)
    for column in ("users", "items", "interactions", *PERCENTILES):
        table.add_column(column, justify="right")
    for domain in dataset.domains:
        facts = (
            domain.users,
            domain.items,
            domain.interactions,
            *domain.length_percentiles.values(),
        )
        table.add_row(escape(domain.name), *(f"{fact:,}" for fact in facts))
    table.add_section()
    facts = (
        dataset.users,
        sum(domain.items for domain in dataset.domains),
        dataset.interactions,
    )
    table.add_row("all", *(f"{fact:,}" for fact in facts))
    return table


@exit_on_input_error
def main():
    engine, *what = parse_arguments()
    if engine == "spark":
        from trainer.data.prepare import spark  # an extra: not everyone has it

        Console().print(summary(spark.prepare(*what)))
    else:
        Console().print(summary(prepare(*what)))


if __name__ == "__main__":
    main()
