"""Ranks held-out items with a trained model and prints HR, NDCG and MRR by domain.

python launch/evaluate.py --run DIR                                  the test items among 99 drawn candidates
deepspeed --num_gpus 2 launch/evaluate.py --run DIR                  the same figures, by two ranks
… --split validation                                                 the validation items
… --ranking full                                                     among all items of the domain, with 95 % intervals,
                                                                     breakdowns, coverage and Gini; and among the drawn ones
… --candidates FILE.parquet                                          given candidates: user_id, positive, negatives
… --output FILE.parquet                                              per user: user_id, domain, rank, scores
"""

import json
import sys
from pathlib import Path

from launch.options import of_a_run
from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error


def parse(arguments=None):
    """The command line."""
    parser = of_a_run(__doc__, "one JSON line in place of the table")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument(
        "--ranking",
        choices=["sampled", "full"],
        default="sampled",
        help="among which items",
    )
    parser.add_argument(
        "--candidates", help="Parquet with user_id, positive, negatives (raw ids)"
    )
    parser.add_argument(
        "--output", help="Parquet that gets each user's rank and scores"
    )
    return parser.parse_args(arguments)


@exit_on_input_error
def main():
    """Loads the run's best model and ranks."""
    check_stack()
    options = parse()
    from rich.console import Console

    from trainer.distributed import process_group
    from trainer.evaluation.evaluate_run import rank_run
    from trainer.reporting.full_ranking_tables import full_tables
    from trainer.reporting.run_log import evaluation_table

    with process_group.joined() as ranks:
        full = options.ranking == "full"
        record = rank_run(
            options.run,
            ranks,
            options.split,
            options.data,
            options.candidates,
            options.output,
            full,
        )
    if ranks.first:
        if full:
            update_report(Path(options.run))
        tables = full_tables(record) if full else [evaluation_table(record)]
        print(json.dumps(record)) if options.json else Console().print(
            *tables, sep="\n"
        )


def update_report(run: Path) -> None:
    """Writes the run's report anew. One that cannot be written stays as it was, which is said."""
    from trainer.distributed.run_lock import locked
    from trainer.reporting.run_log import METRICS_FILE
    from trainer.reporting.run_report import write_report

    if not (run / METRICS_FILE).is_file():
        return
    try:
        with locked(run):
            write_report(run)
    except InputError as error:
        print(f"{error}: its report stays as it was", file=sys.stderr, flush=True)
    except OSError as error:
        print(
            f"{run}: cannot be written ({error.strerror}): its report stays as it was",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    run_script(main)
