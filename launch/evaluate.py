"""Ranks held-out items (leave-one-out) by a trained model, and prints HR, NDCG and MRR by domain.

    python launch/evaluate.py --run DIR                        the test items, 99 drawn candidates
    deepspeed --num_gpus 2 launch/evaluate.py --run DIR        the same figures, by two ranks
    … --split validation                                       the validation items
    … --split arrivals --data LATER                            all events after the run's own logs
    … --ranking full                                           among all items of the domain
    … --candidates FILE.parquet                                user_id, positive, negatives
    … --output FILE.parquet                                    per user: domain, rank, scores
    … --recency-term                                           with what was bought lately, too
    … --titles FILE.csv                                        item titles for the run's report

A full ranking has 95 % intervals, breakdowns, coverage and Gini; the drawn candidates come besides.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.stack import check_stack
from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import FinishedRun, ItemTitles
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks


@dataclass(frozen=True, kw_only=True)
class Options(ItemTitles, FinishedRun):
    """The command line."""

    split: Literal["test", "validation", "arrivals"] = option(
        "the held-out items to rank; arrivals: what came with the newest logs of --data",
        "test",
    )
    ranking: Literal["sampled", "full"] = option("among which items", "sampled")
    candidates: str | None = option(
        "Parquet with user_id, positive, negatives (raw ids)",
        None,
        metavar="FILE",
    )
    recency_term: bool = option(
        "rank test items by the model with its recency term, too", False
    )
    skip_recency: bool = option(
        "leave recency popularity out: events need not be counted", False
    )
    output: str | None = option(
        "Parquet that gets each user's rank and scores", None, metavar="FILE"
    )
    record: str | None = option(
        "JSON file that gets the record", None, metavar="FILE"
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Loads the run's best model and ranks."""
    options = parse()
    check_stack(options.device)
    from rich.console import Console

    from trainer.distributed import process_group
    from trainer.files.atomic import write_json
    from trainer.reporting.console import evaluation_table
    from trainer.reporting.full_ranking_tables import full_tables
    from trainer.reporting.line_folding import WIDTH_IN_A_PIPE
    from trainer.reporting.run_report import update_report
    from trainer.reporting.titles import add_titles, check_titles

    full = options.ranking == "full"
    if options.titles:
        check_titles(Path(options.titles), Path(options.run))
    with process_group.join_process_group(device=options.device) as ranks:
        record = _evaluate(options, ranks)
    if not ranks.first:
        return
    if options.record:
        write_json(Path(options.record), record)
    if "skipped" in record and not options.json:
        print(f"nothing is ranked: {record['skipped']}")
        return
    if options.titles:
        add_titles(Path(options.run), Path(options.titles))
    if full or options.titles:
        update_report(Path(options.run))
    if options.json:
        print(json.dumps(record))
        return
    tables = full_tables(record) if full else [evaluation_table(record)]
    width = None if sys.stdout.isatty() else WIDTH_IN_A_PIPE
    Console(width=width).print(*tables, sep="\n")


def _evaluate(options: Options, ranks: "Ranks") -> dict[str, Any]:
    """The record of what is asked for. Called on all ranks."""
    from trainer.evaluation.evaluate_run import evaluate_run
    from trainer.retraining.prequential import ARRIVALS, score_arrivals

    if options.split != ARRIVALS:
        return evaluate_run(
            options.run,
            ranks,
            options.split,
            options.data,
            options.candidates,
            options.output,
            options.ranking == "full",
            options.recency_term,
            options.skip_recency,
        )
    refused = {
        "--candidates": options.candidates is not None,
        "--output": options.output is not None,
        "--titles": options.titles is not None,
        "--skip-recency": options.skip_recency,
        "--ranking full": options.ranking == "full",
    }
    for name, is_given in refused.items():
        if is_given:
            raise InputError(
                f"{name}: not with --split arrivals, whose events are ranked among drawn "
                "candidates, beside recency popularity: leave it out"
            )
    return score_arrivals(
        options.run, ranks, options.data, options.recency_term
    )


if __name__ == "__main__":
    run_script(main)
