"""Prepares interaction logs for training: Parquet, CSV, TSV, JSON Lines and others in, shards out.

    python launch/prepare.py --input logs/ more.csv 'days/2024-*.parquet' --output data/shop

Every row of the logs is one interaction: user, item, domain, time. `--domain NAME` stands for a
missing domain column. What does not fit into --memory goes beside the output. Killed, the same
command goes on from the stages that were finished.

    python launch/prepare.py --input logs/ --output data/1 --keep-log
    python launch/prepare.py --input logs/2026-11-26.parquet --extend data/1 --output data/2

brings new logs onto a dataset: items keep their rows of the item matrix, new ones take rows that
were reserved for them. docs/data.md has a command for every form of log.
"""

from trainer.interrupts import begin_work, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console

from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import LogColumns
from trainer.config.prepare import PrepareConfig
from trainer.data.format.dataset import Dataset
from trainer.data.prepare.assembly import PERCENTILES
from trainer.data.prepare.extend import read_options
from trainer.data.prepare.pipeline import prepare
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error
from trainer.reporting.command_tables import dataset_notes, dataset_table


@dataclass(frozen=True, kw_only=True)
class Options(LogColumns):
    """The command line. None: the default, or that of the extended dataset."""

    input: tuple[str, ...] = option("files, folders or globs", metavar="PATH")
    output: str = option(
        "a folder that does not exist yet or is empty", metavar="DIR"
    )
    domain: str | None = option(
        "the one domain of logs without a domain column", None, metavar="NAME"
    )
    extend: str | None = option(
        "the dataset onto which these logs come", None, metavar="DIR"
    )
    keep_log: bool = option(
        "keep the log in the dataset, so that it can be extended", False
    )
    whole_log: bool = option(
        "these logs are all, in place of the kept one", False
    )
    since: str | None = option(
        "leave out what is older, a time as the logs have it",
        None,
        metavar="TIME",
    )
    days: float | None = option(
        "leave out what is older than N days before the newest row",
        None,
        metavar="N",
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = option(
        "of times that are numbers, for --days", None
    )
    tie_order: Literal["hash", "file"] | None = option(
        "of a user's events at the same time: by a hash, which says nothing, or as "
        "the rows stand in the files (default: hash, or the extended dataset's)",
        None,
    )
    retire: bool = option(
        "items without an event left give up their rows", False
    )
    min_user: int | None = option(
        "drop users with fewer interactions (default: 0, or the extended dataset's)",
        None,
        metavar="N",
    )
    min_item: int | None = option(
        "drop items with fewer interactions (default: 0, or the extended dataset's)",
        None,
        metavar="N",
    )
    min_domain: int | None = option(
        "leave out domains with fewer interactions or one item (default: 0, or "
        "the extended dataset's)",
        None,
        metavar="N",
    )
    seed: int | None = option(
        "of the shuffle of users (default: 0, or the extended dataset's)", None
    )
    streams: int | None = option(
        "at least as many as ranks, best a multiple of them (default: 64, fewer "
        "for few users, or the extended dataset's)",
        None,
        metavar="N",
    )
    shard_users: int = option("most users in a shard", 32768, metavar="N")
    block_users: int = option(
        "most users in a block of a shard", 1024, metavar="N"
    )
    memory: str = option("of all processes together", "8GB", metavar="SIZE")
    processes: int = option("how many work; 0: one a core", 0, metavar="N")
    engine: Literal["duckdb", "spark"] = option(
        "spark: the session of spark-submit", "duckdb"
    )
    fresh: bool = option("begin anew where an earlier call was killed", False)


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


def prepare_config(options: Options) -> PrepareConfig:
    """What to prepare. Raises InputError where the engine cannot do it."""
    windowed = options.since is not None or options.days is not None
    if options.engine == "spark" and (
        options.extend is not None or options.keep_log or windowed
    ):
        raise InputError(
            "--engine spark prepares whole logs: --extend, --keep-log and windows are DuckDB's"
        )
    settings = {} if options.extend is None else read_options(options.extend)
    for name, value in asdict(options).items():
        if value is not None and name not in ("input", "engine", "fresh"):
            settings[name] = value
    return PrepareConfig(inputs=options.input, **settings)


def run_engine(options: Options) -> Dataset:
    """Prepares the dataset with the chosen engine."""
    config = prepare_config(options)
    if options.engine == "spark":
        from trainer.data.prepare import spark  # an extra: not everyone has it

        return spark.prepare(config, options.fresh)
    return prepare(config, options.fresh)


@exit_on_input_error
def main() -> None:
    """Prepares the dataset and says how large it is."""
    options = parse()
    begin_work()
    dataset = run_engine(options)
    console = Console()
    console.print(dataset_table(dataset, tuple(PERCENTILES)))
    for line in dataset_notes(dataset):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_script(main, goes_on=True)
