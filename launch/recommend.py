"""Recommends the best items of each domain to every user: Parquet in, partitioned Parquet out.

    python launch/recommend.py --run DIR --output DIR                  all users of its dataset
    python launch/recommend.py --run DIR --input LOGS --output DIR     all users of these logs
    torchrun --nproc-per-node 4 -- launch/recommend.py --of DIR …      the same, by four ranks
    … --users FILE                                                     of these users alone
    … -k 1 --domain D                                                  one item of one domain

Written: DIR/domain=NAME/part-*.parquet with user_id, history, rank, item_id, score; and
DIR/_recommend.json. Items of a user's history are left out (--keep-seen keeps them); users who are
new to the model are among them (cold start). Killed, the same command goes on from the finished
parts.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from launch.options import FinishedRun, LogColumns
from launch.stack import check_stack
from trainer.config.command_line import option, parse_options
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options(LogColumns, FinishedRun):
    """The command line."""

    output: str = option(
        "a folder that does not exist yet or is empty", metavar="DIR"
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
    check_stack()
    options = parse()
    from rich.console import Console

    from launch.tables import recommendation_table
    from trainer.config.serving import HistoriesConfig, RecommendConfig
    from trainer.distributed import process_group
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
        options.k, tuple(options.domain), options.keep_seen, options.batch_size
    )
    with process_group.join_process_group() as ranks:
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


if __name__ == "__main__":
    run_script(main)
