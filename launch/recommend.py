"""Recommends the best items of each domain to every user: Parquet in, partitioned Parquet out.

    python launch/recommend.py --run DIR --output DIR                  all users of its dataset
    python launch/recommend.py --run DIR --input LOGS --output DIR     all users of these logs
    torchrun --nproc-per-node 4 -- launch/recommend.py --of DIR …      the same, by four ranks
    … --users FILE                                                     of these users alone
    python launch/recommend.py --run DIR --user ID                     to one user, on the terminal
    … -k 1 --domain D                                                  one item of one domain

Written: DIR/domain=NAME/part-*.parquet with user_id, history, rank, item_id, score; and
DIR/_recommend.json. Items of a user's history are left out (--keep-seen keeps them); users who are
new to the model are among them (cold start). Killed, the same command goes on from the finished
parts.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import json
from collections.abc import Iterable
from dataclasses import dataclass

from launch.stack import check_stack
from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import (
    FinishedRun,
    LogColumns,
    RecencyTerm,
)
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options(LogColumns, RecencyTerm, FinishedRun):
    """The command line."""

    output: str | None = option(
        "a folder that does not exist yet or is empty; needed, but for --user",
        None,
        metavar="DIR",
    )
    user: list[str] = option(
        "show this user's recommendations, and write nothing",
        list,
        repeat=True,
        metavar="ID",
    )
    input: tuple[str, ...] = option(
        "logs: files, folders or globs", (), metavar="PATH"
    )
    users: str | None = option(
        "Parquet, CSV or TSV with the user column: of these users alone",
        None,
        metavar="FILE",
    )
    k: int = option(
        "items for each user and domain", 10, flags=("-k",), metavar="K"
    )
    domain: list[str] = option(
        "recommend items of this domain", list, repeat=True, metavar="D"
    )
    keep_seen: bool = option("recommend what the user has had, too", False)
    log_domain: str | None = option(
        "the one domain of logs without a domain column", None, metavar="NAME"
    )
    batch_size: int = option("users of one rank at once", 512, metavar="N")
    part_users: int = option("users in each file", 65536, metavar="N")
    memory: str = option(
        "that reading the logs keeps to", "8GB", metavar="SIZE"
    )
    fresh: bool = option("begin anew where an earlier call was killed", False)


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Loads the run's best model and recommends."""
    options = parse()
    check_stack(options.device)
    if options.user:
        _show_users(options)
        return
    if options.output is None:
        raise InputError(
            "--output DIR is missing: the folder that gets the recommendations; or give --user ID, "
            "to see one user's"
        )
    from rich.console import Console

    from trainer.config.serving import HistoriesConfig, RecommendConfig
    from trainer.distributed import process_group
    from trainer.reporting.command_tables import recommendation_table
    from trainer.serving.recommend import recommend

    asked = HistoriesConfig(
        inputs=options.input,
        users=options.users,
        **options.log_settings(),
        log_domain=options.log_domain,
        memory=options.memory,
        part_users=options.part_users,
    )
    config = RecommendConfig(
        options.k,
        tuple(options.domain),
        options.keep_seen,
        options.wants_recency_term(),
        options.batch_size,
    )
    with process_group.join_process_group(device=options.device) as ranks:
        record = recommend(
            options.run,
            options.output,
            ranks,
            config,
            asked,
            options.data,
            options.fresh,
        )
    if not ranks.first:
        return
    if options.json:
        print(json.dumps(record))
    else:
        Console().print(recommendation_table(options.output, record))


def _show_users(options: Options) -> None:
    """Prints the recommendations of the users of --user."""
    from rich.console import Console

    from trainer.api import Run
    from trainer.reporting.command_tables import user_table

    if options.output is not None or options.users is not None:
        raise InputError(
            "--user shows recommendations and writes nothing: leave out --output and --users, or "
            "name the user in a file for --users"
        )
    run = Run.open(options.run, options.data, options.device)
    table = run.recommend(
        options.k,
        domains=options.domain,
        users=options.user,
        logs=options.input,
        keep_seen=options.keep_seen,
        recency_term=options.wants_recency_term(),
        user_column=options.user_column,
        item_column=options.item_column,
        domain_column=options.domain_column,
        time_column=options.time_column,
        log_domain=options.log_domain,
        memory=options.memory,
    )
    rows = table.to_pylist()
    if options.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    console = Console()
    for user in dict.fromkeys(row["user_id"] for row in rows):
        own = [row for row in rows if row["user_id"] == user]
        console.print(user_table(own))


if __name__ == "__main__":
    run_script(main, goes_on=True)
