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

from launch.options import of_a_run
from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


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
        tables = full_tables(record) if full else [evaluation_table(record)]
        print(json.dumps(record)) if options.json else Console().print(
            *tables, sep="\n"
        )


if __name__ == "__main__":
    run_script(main)
