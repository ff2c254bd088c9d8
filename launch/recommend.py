"""Recommends the best items of each domain to every user, with a trained model: Parquet in, partitioned Parquet out.

    python launch/recommend.py --run DIR --output DIR                         all users of the run's dataset
    python launch/recommend.py --run DIR --input LOGS --output DIR            all users of these logs, new ones included
    torchrun --nproc-per-node 4 -- launch/recommend.py …                      the same, by four ranks
    … --users FILE                                                            of these users alone
    … -k 1 --domain D                                                         the one best item of one domain

Written: DIR/domain=NAME/part-*.parquet with user_id, history, rank, item_id, score; DIR/recommend.json. Items of a user's
history are left out (--keep-seen keeps them). Killed, the same command goes on from the parts that were finished.
"""

import json

from launch.options import of_a_run
from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


def parse(arguments=None):
    """The command line."""
    parser = of_a_run(__doc__, "recommend.json in one line in place of the table")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet or is empty",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=(),
        metavar="PATH",
        help="logs: files, folders or globs",
    )
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="Parquet, CSV or TSV with the user column: of these users alone",
    )
    parser.add_argument(
        "-k",
        type=int,
        default=10,
        help="items for each user and domain (default: %(default)s)",
    )
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="D",
        help="recommend items of this domain; repeatable",
    )
    parser.add_argument(
        "--keep-seen", action="store_true", help="recommend what the user has had, too"
    )
    columns = {
        "user": "user_id",
        "item": "item_id",
        "domain": "domain",
        "time": "timestamp",
    }
    for role, name in columns.items():
        parser.add_argument(
            f"--{role}-column",
            default=name,
            metavar="NAME",
            help=f"of the logs (default: {name})",
        )
    parser.add_argument(
        "--log-domain",
        metavar="NAME",
        help="the one domain of logs without a domain column",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=512,
        metavar="N",
        help="users of one rank at once",
    )
    parser.add_argument(
        "--part-users", type=int, default=65536, metavar="N", help="users in each file"
    )
    parser.add_argument(
        "--memory",
        default="8GB",
        help="that reading the logs keeps to (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew where an earlier call was killed",
    )
    return parser.parse_args(arguments)


def table(output, record):
    """What was recommended to how many."""
    from rich.markup import escape
    from rich.table import Table

    users = f"{record['users']:,} users, {record['without_history']:,} of them without a history that the model knows"
    found = Table(
        "domain",
        title=f"{escape(str(output))}: {users}",
        title_justify="left",
        caption_justify="left",
    )
    found.add_column("recommendations", justify="right")
    for name, rows in record["rows"].items():
        found.add_row(escape(name), f"{rows:,}")
    left_out = [
        f"{record[key]:,} {what}"
        for key, what in {
            "unknown_domain": "interactions of domains that the model does not know are left out",
            "unknown_item": "interactions with items that the model does not know are left out",
            "unread": "users of damaged shards are left out",
        }.items()
        if record[key]
    ]
    found.caption = "\n".join(left_out) or None
    return found


@exit_on_input_error
def main():
    """Loads the run's best model and recommends."""
    check_stack()
    options = parse()
    from rich.console import Console

    from trainer.distributed import process_group
    from trainer.serving.recommend import RecommendConfig, recommend
    from trainer.serving.user_histories import AskedConfig

    own = (
        "user_column",
        "item_column",
        "domain_column",
        "time_column",
        "log_domain",
        "memory",
        "part_users",
        "users",
    )
    asked = AskedConfig(
        inputs=tuple(options.input), **{name: getattr(options, name) for name in own}
    )
    config = RecommendConfig(
        options.k, tuple(options.domain), options.keep_seen, options.batch_size
    )
    with process_group.joined() as ranks:
        record = recommend(
            options.run,
            options.output,
            ranks,
            config,
            asked,
            options.data,
            options.fresh,
        )
    if ranks.first:
        print(json.dumps(record)) if options.json else Console().print(
            table(options.output, record)
        )


if __name__ == "__main__":
    run_script(main)
