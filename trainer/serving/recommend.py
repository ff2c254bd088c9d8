"""Batch inference: the best items of each domain for many users, as partitioned Parquet.

    OUTPUT/domain=NAME/part-00000.parquet …   user_id, history (int32), rank (int32, from 1),
                                              item_id, score (float32)
    OUTPUT/_recommend.json                     what it was made from, and what is there

A row is one recommendation. A user's rows stand together, best first, and a user is in one part.
Ids have the types that they came with. A user gets fewer than `k` items where a domain has fewer
left. `history` counts the user's interactions that the model knows. A user without any (cold
start) gets what the model predicts at the start of a history: its SOS token is trained on every
user's first item. A domain's name stands in its folder as Hive writes it.

Recommendations are made in stages that leave files (`Work`): the histories, then part after part.
A killed call goes on from the finished parts, at any number of ranks. OUTPUT is there whole or
not at all; it lies on storage that all hosts see. A step's users depend on the part alone, not on
the number of ranks, so the model's sums are the same.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.best_model import (
    TrainedModel,
    load_trained_model,
    open_run,
)
from trainer.config.serving import HistoriesConfig, RecommendConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.day_counts import count_recent
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.evaluation.recency.stored import open_recency_term
from trainer.evaluation.recency.term import RecencyTerm
from trainer.files.progress import Stages
from trainer.files.staged import work_folder
from trainer.run_files import BEST, CHECKPOINTS, MANIFEST
from trainer.serving.recommendation_files import (
    OLD_RECORD,
    RECORD,
    RecommendationFiles,
)
from trainer.serving.top_items import Scorer
from trainer.serving.user_histories import check_memory, describe_request

FORMAT_VERSION = 1


def recommend(
    run: str | Path,
    output: str | Path,
    ranks: Ranks,
    config: RecommendConfig,
    histories_config: HistoriesConfig,
    data: str | Path | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Writes the folder `output` and returns the content of its _recommend.json.

    Called on all ranks. Where an earlier call with the same run, users and options was killed,
    this one goes on from its finished parts; fresh: begins anew. An output that this call would
    make again is left alone. data: the run's dataset where it has moved.

    Raises InputError for whatever is wrong with the run, the logs, the users, a domain's name or
    the folder. It also names what differs from an earlier call that was killed.
    """
    check_memory(histories_config)
    output = Path(output)
    run_config, dataset = open_run(run, data, of_all_domains=True, ranks=ranks)
    if config.recency_term is None:
        with_term = run_config.evaluation.recency_term
        config = replace(config, recency_term=with_term)
    if config.recency_term and histories_config.inputs:
        raise InputError(
            "the recency term counts the run's dataset, which does not have the logs of --input: "
            "prepare it with them (launch/prepare.py --extend), and name it by --data, or score "
            "without by --skip-recency-term"
        )
    domains = _select_domains(dataset, config.domains)
    request = _Request(Path(run), dataset, domains, config, histories_config)
    made_from = run_on_first_rank(request.describe, ranks.first)
    record = run_on_first_rank(
        lambda: _read_finished(output, made_from), ranks.first
    )
    if record is not None:
        return record
    served = load_trained_model(run, run_config, dataset, ranks)
    term = None
    if config.recency_term:
        term = _open_term(served)
    skip_damaged = run_config.stream.damaged == "skip"
    with (
        Stages(ranks.first) as stages,
        RecommendationFiles(output, ranks, stages, made_from, fresh) as files,
    ):
        counts = files.write_histories(histories_config, dataset, skip_damaged)
        scorer = Scorer(served, domains, config, term)
        files.write_parts(scorer, counts, histories_config.part_users)
        made_from["best_step"] = served.checkpoint["step"]
        return files.deliver(made_from, counts)


def _open_term(served: TrainedModel) -> RecencyTerm:
    """The model's recency term, with the counts of the dataset."""
    counts = count_recent(served.dataset, served.ranks, served.config.stream)
    return open_recency_term(served, counts)


def _select_domains(
    dataset: Dataset,
    names: tuple[str, ...],
) -> list[int]:
    """The numbers of the domains with these names, rising; of all domains without names."""
    if not names:
        return list(range(len(dataset.domains)))
    return sorted({dataset.domain_number(name) for name in names})


@dataclass(frozen=True)
class _Request:
    """A call of `recommend`: the run, its dataset, domains by number, and both settings."""

    run: Path
    dataset: Dataset
    domains: list[int]
    config: RecommendConfig
    users: HistoriesConfig

    def describe(self) -> dict[str, Any]:
        """What the recommendations depend on, by the options' names: JSON values."""
        names = [self.dataset.domains[number].name for number in self.domains]
        made_from = {
            "format_version": FORMAT_VERSION,
            "model": _hash_model(self.run),
            "dataset": self.dataset.fingerprint,
            "k": self.config.k,
            "domains": names,
            "keep_seen": self.config.keep_seen,
            "recency_term": self.config.recency_term,
            **describe_request(self.users),
        }
        return json.loads(json.dumps(made_from))


def _hash_model(run: Path) -> str | None:
    """The sha256 of the best checkpoint's manifest; None where loading it will raise."""
    try:
        best = json.loads((run / BEST).read_text(encoding="utf-8"))
        checkpoint = Path(best["folder"])
        if checkpoint.parent != Path(CHECKPOINTS):
            raise ValueError(f"{checkpoint} is no checkpoint's name")
        manifest = (run / checkpoint / MANIFEST).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256(manifest).hexdigest()


def _read_finished(
    output: Path,
    made_from: dict[str, Any],
) -> dict[str, Any] | None:
    """The record of a finished output that was made from the same; None without one."""
    try:
        file = output / RECORD
        if not file.is_file():
            file = output / OLD_RECORD
        record = json.loads(file.read_text(encoding="utf-8"))
        # An earlier version had no term.
        known = {"recency_term": False, **record["made_from"]}
        if not known.items() >= made_from.items():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # A kill may have come before the work folder was taken away.
    shutil.rmtree(work_folder(output), ignore_errors=True)
    return record
