"""A run's best model on another dataset than its own, where users, items and domains are others by now: to begin a new run with
(`warm_start=RUN`), and to be evaluated. Items are found again by their ids.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from embeddings.warm_start import carry_rows
from syncrec.warm_start import grown_state
from trainer.checkpoint.resume import MAY_CHANGE, recorded_settings, shown_value
from trainer.checkpoint.save import best_checkpoint, dense_state, reading, table_ranges
from trainer.config.load import flat, load_recorded
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.distributed.agreement import by_the_first
from trainer.distributed.consensus import on_all_ranks
from trainer.errors import InputError
from trainer.files.redact import folder_of, shown, words

# What a new run may have otherwise than the one whose model it begins with: how it learns, and on what.
MAY_DIFFER = (
    *MAY_CHANGE,
    "seed",
    "global_batch_size",
    "tokens_per_batch",
    "warm_start",
    "warm_kept",
    "optimizer",
    "table.learning_rate",
    "table.init_std",
    "table.communication",
    "negatives",
    "stream",
    "evaluation",
    "deepspeed",
    "model.time_knots",
    "model.dropout",
    "model.loss",
    "model.eta",
    "model.learn_scales",
    "model.correction_temperature",
    "model.prediction_temperature",
    "model.mutual_information_temperature",
    "model.mutual_information_negatives",
    "model.mutual_information_denominator",
    "model.mutual_information_pooling",
    "model.mutual_information_similarity",
    "model.precision",
    "model.kernel",
    "model.init_std",
)


@dataclass(frozen=True)
class Carried:
    """What is left of a run's best model. source_N: which row of the old table each row of M was, −1: none; group_N: its
    domain, −1: no item has it. old_of_D: the old number of each domain, −1: new; spans: (first, last) time, old and new."""

    run: Path
    folder: Path
    source_N: np.ndarray
    group_N: np.ndarray
    old_of_D: list[int]
    spans: tuple[tuple[float, float], tuple[float, float]]

    @property
    def known(self) -> int:
        """How many items of the dataset the old model knows."""
        return int(np.count_nonzero(self.source_N >= 0))

    @property
    def share(self) -> str:
        """The same in words, with how many items there are."""
        return f"{self.known:,} of {np.count_nonzero(self.group_N >= 0):,} items"

    def restore_model(self, model):
        """Fills the dense model's weights and buffers, before an engine is built around it. Called
        on all ranks."""

        def fill():
            with reading(self.folder):
                knots = model.config.time_knots
                model.load_state_dict(
                    grown_state(
                        dense_state(self.folder), self.old_of_D, self.spans, knots
                    )
                )

        on_all_ranks(fill)

    def restore_table(self, table, init_std, kept=1.0):
        """Fills the table and its optimizer's state; kept: see carry_rows. Called on all ranks."""
        with reading(self.folder):
            ranges = table_ranges(self.folder)
            carry_rows(
                table, self.folder, self.source_N, self.group_N, init_std, kept, ranges
            )


def find_warm_start(config: RunConfig, dataset: Dataset, ranks) -> Carried | None:
    """What `config.warm_start` names; None where it names nothing. Called on all ranks.

    Raises InputError: it is no finished run, its model is of another kind, or nobody knows any more what its rows were.
    """
    if not config.warm_start:
        return None
    run = Path(config.warm_start)

    def look():
        if not (run / "config.yaml").is_file():
            raise InputError(
                f"warm_start={run}: is no run (there is no config.yaml in it)"
            )

    on_all_ranks(look)
    folder, _, facts = best_checkpoint(run, ranks)
    now = flat(config)
    refused = _differences(recorded_settings(facts, now), now)
    if refused:
        raise InputError(
            f"warm_start={run}: its model is of another kind: {'; '.join(refused)}: put it back, or start cold"
        )
    return carried(run, folder, facts["dataset"], dataset, ranks)


def carried(run: Path, folder: Path, fingerprint, dataset: Dataset, ranks) -> Carried:
    """What a run's checkpoint in `folder`, of the dataset with the fingerprint, is on another one. Called on all ranks; the
    first one looks for the items, and tells the others. Raises InputError where nobody knows any more what its rows were, and
    where the datasets have no domain in common."""
    names, span, source_N = _told_rows(run, fingerprint, dataset, ranks)
    group_N = np.full(dataset.num_embeddings, -1, np.int32)
    for number, domain in enumerate(dataset.domains):
        group_N[domain.start : domain.start + domain.items] = number
    old_of_D = [
        names.index(domain.name) if domain.name in names else -1
        for domain in dataset.domains
    ]
    if max(old_of_D) < 0:
        domains = ", ".join(domain.name for domain in dataset.domains)
        raise InputError(f"{run}: its model knows none of the domains {domains}")
    return Carried(
        run,
        folder,
        source_N,
        group_N,
        old_of_D,
        (span, (dataset.first_time, dataset.last_time)),
    )


def _told_rows(run, fingerprint, dataset, ranks):
    """`_known_rows` of the first rank, on all."""
    source_N = None

    def look():
        nonlocal source_N
        names, span, source_N = _known_rows(run, fingerprint, dataset)
        return names, span

    names, span = by_the_first(look, ranks.first)
    told_N = torch.empty(dataset.num_embeddings, dtype=torch.int32)
    if ranks.first:
        told_N.copy_(torch.from_numpy(source_N))
    dist.broadcast(told_N, 0)
    return names, tuple(span), told_N.numpy()


def _known_rows(run, fingerprint, dataset):
    """The old domains' names in their order, the old span of time, and source_N."""
    # DuckDB and Arrow are for a warm start alone.
    import pyarrow as pa

    from trainer.data.duckdb_engine import limited_engine
    from trainer.data.prepare.extend import EXTENSION, rows_of_extension, rows_of_items

    facts = dataset.folder / EXTENSION / "extension.json"
    if fingerprint == dataset.fingerprint:
        rows = np.arange(dataset.num_embeddings)
        return (
            [domain.name for domain in dataset.domains],
            (dataset.first_time, dataset.last_time),
            rows,
        )
    if facts.is_file():
        try:
            said = json.loads(facts.read_text(encoding="utf-8"))
            if said["of"] == fingerprint:
                first, last = map(float, said["span_before"])
                names = [str(name) for name in said["domains_before"]]
                return names, (first, last), rows_of_extension(dataset)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            pa.ArrowException,
        ) as error:
            raise InputError(
                f"{facts.parent}: cannot be used ({words(error)}): copy the dataset again"
            ) from None
    config = load_recorded(run / "config.yaml")
    if folder_of(config.data) is None:
        raise InputError(
            f"{run}: what its model's rows were is not known: it was trained from an address, {words(shown(config.data))}, "
            f"which is not fetched from on a run's word; copy the dataset to a folder and name it as data in {run}/config.yaml"
        )
    try:
        old = Dataset.load(config.data, check_shards=False)
    except InputError as error:
        raise InputError(
            f"{run}: what its model's rows were is not known: {error}"
        ) from None
    if old.fingerprint != fingerprint:
        raise InputError(
            f"{run}: its dataset {config.data} has other contents by now: nobody knows what its model's rows were"
        )
    with limited_engine() as connection:
        rows = rows_of_items(old, dataset, connection)
    return (
        [domain.name for domain in old.domains],
        (old.first_time, old.last_time),
        rows,
    )


def _differences(before, now):
    return [
        f"{key} was {shown_value(before, key)}, is {shown_value(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER)
    ]
