"""Warm start: a run's best model on a dataset whose users, items and domains are others by now.

A new run begins with it (`warm_start=RUN`), and it is evaluated so. Items are matched by their ids,
domains by their names.

Shapes: N rows of the item table M, D domains.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from embeddings.warm_start import carry_rows
from syncrec.warm_start import grow_state
from trainer.checkpoint.load import (
    find_best,
    load_dense_state,
    read_table_ranges,
    refuse_unreadable,
)
from trainer.checkpoint.resume import (
    Settings,
    describe_change,
)
from trainer.config.changes import may_change_on_warm_start, refused_changes
from trainer.config.load import flatten_config, load_recorded
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.consensus import run_on_all_ranks
from trainer.errors import InputError
from trainer.files.redact import (
    find_local_folder,
    printable_text,
    redact_location,
)
from trainer.files.relocation import relocate
from trainer.run_files import CONFIG, EXTENSION

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from syncrec.model import SyNCRec
    from trainer.distributed.process_group import Ranks


TimeSpan = tuple[float, float]  # the first and the last time of a dataset


@dataclass(frozen=True)
class WarmStart:
    """A run's best model, matched with a dataset.

    source_N: the row of the old table that each row of M was, −1 for none. group_N: the domain of
    each row, −1 where no item has the row. old_of_D: the old number of each domain, −1 for a new
    one. spans: of the old dataset and of the new one.

    Example: domain 0 of 2 items has lost one of them and got another, domain 1 is new, and each
    domain has a spare row:

        old rows    0: a0   1: a1   2: –
        new rows    0: a1   1: a2   2: –   3: b0   4: –

        source_N    [1, −1, −1, −1, −1]
        group_N     [0,  0, −1,  1, −1]
        old_of_D    [0, −1]
    """

    run: Path
    folder: Path
    source_N: np.ndarray
    group_N: np.ndarray
    old_of_D: list[int]
    spans: tuple[TimeSpan, TimeSpan]

    @property
    def known(self) -> int:
        """How many items of the dataset the old model knows."""
        is_known_N = self.source_N >= 0
        return int(np.count_nonzero(is_known_N))

    @property
    def share(self) -> str:
        """The known items and all items, in words."""
        has_item_N = self.group_N >= 0
        items = np.count_nonzero(has_item_N)
        return f"{self.known:,} of {items:,} items"

    def restore_model(self, model: "SyNCRec") -> None:
        """Fills the dense model's weights and buffers, before an engine is built around it.

        Called on all ranks.
        """

        def fill() -> None:
            with refuse_unreadable(self.folder):
                knots = model.config.time_knots
                old_state = load_dense_state(self.folder)
                state = grow_state(old_state, self.old_of_D, self.spans, knots)
                model.load_state_dict(state)

        run_on_all_ranks(fill)

    def restore_table(
        self, table: "ItemTable", init_std: float, kept: float = 1.0
    ) -> None:
        """Fills the table and its optimizer's state. Called on all ranks.

        init_std, kept: as in `embeddings.warm_start.carry_rows`.
        """
        with refuse_unreadable(self.folder):
            ranges = read_table_ranges(self.folder)
            carry_rows(
                table,
                self.folder,
                self.source_N,
                self.group_N,
                init_std,
                kept,
                ranges,
            )


def find_warm_start(
    config: RunConfig, dataset: Dataset, ranks: "Ranks"
) -> WarmStart | None:
    """Matches the model that `config.warm_start` names; None without one. Called on all ranks.

    Raises InputError where it is no finished run, its model is of another kind, or nobody knows any
    more what its rows were.
    """
    if not config.warm_start:
        return None
    run = Path(config.warm_start)

    def require_run() -> None:
        if not (run / CONFIG).is_file():
            raise InputError(
                f"warm_start={run}: is no run (there is no config.yaml in it)"
            )

    run_on_all_ranks(require_run)
    folder, _, record = find_best(run, ranks)
    now = flatten_config(config)
    changes = _list_differences(record["config"], now)
    if changes:
        raise InputError(
            f"warm_start={run}: its model is of another kind: {'; '.join(changes)}: "
            "put it back, or start cold"
        )
    return match_model(run, folder, record["dataset"], dataset, ranks)


def match_model(
    run: Path, folder: Path, fingerprint: str, dataset: Dataset, ranks: "Ranks"
) -> WarmStart:
    """Matches a run's checkpoint with a dataset that may not be its own. Called on all ranks.

    folder: the checkpoint's. fingerprint: of its own dataset. The first rank looks for the items,
    and sends what it finds to the others. Raises InputError where nobody knows any more what the
    old rows were, and where the datasets have no domain in common.
    """
    old = _share_old_rows(run, fingerprint, dataset, ranks)
    group_N = np.full(dataset.num_embeddings, -1, np.int32)
    old_of_D = []
    for number, domain in enumerate(dataset.domains):
        group_N[domain.start : domain.start + domain.items] = number
        old_number = -1
        if domain.name in old.domains:
            old_number = old.domains.index(domain.name)
        old_of_D.append(old_number)
    if max(old_of_D) < 0:
        domains = ", ".join(_domain_names(dataset))
        raise InputError(
            f"{run}: its model knows none of the domains {domains}"
        )
    spans = (old.span, _time_span(dataset))
    return WarmStart(run, folder, old.source_N, group_N, old_of_D, spans)


@dataclass(frozen=True)
class _OldRows:
    """What is known of a model's own dataset, matched with another one.

    domains: names, in their old order. span: its first and last time. source_N: as in WarmStart.
    """

    domains: list[str]
    span: TimeSpan
    source_N: np.ndarray


def _share_old_rows(
    run: Path, fingerprint: str, dataset: Dataset, ranks: "Ranks"
) -> _OldRows:
    """Finds the old rows on the first rank, for all."""
    old_source_N: np.ndarray = np.zeros(0, np.int32)  # the first rank's

    def find() -> tuple[list[str], TimeSpan]:
        nonlocal old_source_N
        old = _find_old_rows(run, fingerprint, dataset)
        old_source_N = old.source_N
        return old.domains, old.span

    domains, span = run_on_first_rank(find, ranks.first)
    source_N = torch.empty(dataset.num_embeddings, dtype=torch.int32)
    if ranks.first:
        source_N.copy_(torch.from_numpy(old_source_N))
    dist.broadcast(source_N, 0)
    return _OldRows(domains, tuple(span), source_N.numpy())


def _find_old_rows(run: Path, fingerprint: str, dataset: Dataset) -> _OldRows:
    """Finds which row each row of M was in the dataset with the fingerprint."""
    if fingerprint == dataset.fingerprint:
        rows_N = np.arange(dataset.num_embeddings)
        return _OldRows(_domain_names(dataset), _time_span(dataset), rows_N)
    extension = _read_extension(dataset, fingerprint)
    if extension is not None:
        return extension
    return _match_items(_load_old_dataset(run, fingerprint), dataset)


def _read_extension(dataset: Dataset, fingerprint: str) -> _OldRows | None:
    """Reads the old rows where the dataset says that it extends the one with the fingerprint."""
    # DuckDB and Arrow are for a warm start alone.
    import pyarrow as pa

    from trainer.data.prepare.extend import read_old_rows

    file = dataset.folder / EXTENSION / "extension.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["of"] != fingerprint:
            return None
        first, last = map(float, record["span_before"])
        domains = [str(name) for name in record["domains_before"]]
        return _OldRows(domains, (first, last), read_old_rows(dataset))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        pa.ArrowException,
    ) as error:
        raise InputError(
            f"{file.parent}: cannot be used ({printable_text(error)}): copy the dataset again"
        ) from None


def _load_old_dataset(run: Path, fingerprint: str) -> Dataset:
    """Opens the dataset that a run was trained on. Raises InputError where it has changed."""
    config = load_recorded(run / CONFIG)
    if find_local_folder(config.data) is None:
        raise InputError(
            f"{run}: what its model's rows were is not known: it was trained from an address, "
            f"{printable_text(redact_location(config.data))}, which is not fetched from on a run's word; "
            f"copy the dataset to a folder and name it as data in {run}/config.yaml"
        )
    try:
        old = Dataset.load(locate_dataset(run, config), check_shards=False)
    except InputError as error:
        raise InputError(
            f"{run}: what its model's rows were is not known: {error}"
        ) from None
    if old.fingerprint != fingerprint:
        raise InputError(
            f"{run}: its dataset {config.data} has other contents by now: "
            "nobody knows what its model's rows were"
        )
    return old


def locate_dataset(run: Path, config: RunConfig) -> str:
    """Where a run's dataset is, as `data` says it: also for who asks from another working folder.

    A relative path is one of the folder in which the run was begun, which `run` tells. After both
    were moved together it leads there too.
    """
    folder = find_local_folder(config.data)
    if folder is None:
        return config.data
    moved = relocate(folder, config.run, run)
    is_elsewhere = not Path(folder).is_absolute() or not Path(folder).is_dir()
    if moved is not None and moved.is_dir() and is_elsewhere:
        return str(moved)
    return config.data


def _match_items(old: Dataset, dataset: Dataset) -> _OldRows:
    """Matches the items of two datasets by their ids."""
    from trainer.data.duckdb_engine import open_limited_engine
    from trainer.data.prepare.extend import join_old_rows

    with open_limited_engine() as connection:
        rows_N = join_old_rows(old, dataset, connection)
    return _OldRows(_domain_names(old), _time_span(old), rows_N)


def _domain_names(dataset: Dataset) -> list[str]:
    """Lists the domains' names in their order."""
    return [domain.name for domain in dataset.domains]


def _time_span(dataset: Dataset) -> TimeSpan:
    """Returns the dataset's first and last time."""
    return dataset.first_time, dataset.last_time


def _list_differences(before: Settings, now: Settings) -> list[str]:
    """Lists the settings that make another kind of model."""
    lines = []
    for key in refused_changes(before, now, may_change_on_warm_start()):
        lines.append(describe_change(key, before, now))
    return lines
