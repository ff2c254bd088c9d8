"""What a run keeps of the recent past, so that it is chosen and fitted once.

    RUN/recency-half-life.json    recency popularity's half-life
    RUN/recency-term.json         the weights of the best model's recency term, by domain

Each file says what it was made of: the dataset, the split, the candidates and, of the term, the
checkpoint. Where that is the same it is read. Otherwise, and where the file is damaged, the value is
made anew, which a line on stderr says, and replaces the file. Kept is what was made of the run's own
dataset alone: on a later one its term is read, and a half-life is chosen for that.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.best_model import TrainedModel, split_as_trained
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.recent_counts import RecentCounts
from trainer.data.split import Timeline
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.run_lock import lock_run_folder
from trainer.errors import InputError
from trainer.evaluation.recency.choice import choose_half_life
from trainer.evaluation.recency.fit import fit_recency_term
from trainer.evaluation.recency.ranking import HalfLifeChoice, RecencyPopularity
from trainer.evaluation.recency.term import (
    RecencyFeatures,
    RecencyTerm,
    read_weights,
)
from trainer.evaluation.sampled import Advance
from trainer.files.atomic import write_json
from trainer.run_files import HALF_LIFE, MANIFEST, RECENCY_TERM, STATE

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

Record = dict[str, Any]

FORMAT_VERSION = 1
_MADE_OF = "made_of"
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)


class KeptRecord:
    """A file of a run's folder: a record, and what it was made of. The first rank uses it.

        {"format_version": 1, "made_of": {"dataset": "3f…", "seed": 0, …}, "half_life": 30, …}

    locked: this process holds the lock of the run's folder already.
    """

    def __init__(self, file: Path, made_of: Record, locked: bool) -> None:
        self.file = file
        self._made_of = json.loads(json.dumps(made_of))
        self._locked = locked

    def read(self, check: Callable[[Record], object]) -> Record | None:
        """The record; None where there is none that can be used, which is said.

        check: raises ValueError, KeyError or TypeError for one that cannot.
        """
        try:
            record = json.loads(self.file.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {record['format_version']!r}")
            made_of = dict(record[_MADE_OF])
            for name, value in self._made_of.items():
                if made_of.get(name) != value:
                    raise ValueError(f"it was made with another {name}")
            check(record)
        except FileNotFoundError:
            return None
        except (OSError, *_UNREADABLE) as error:
            reason = str(error)
            if isinstance(error, KeyError):
                reason = f"it has no {error}"
            _warn(f"{self.file}: is made anew: {reason}")
            return None
        return record

    def write(self, record: Record) -> None:
        """Replaces the file, atomically. Where that fails, says that the record is not kept."""
        whole = {
            "format_version": FORMAT_VERSION,
            _MADE_OF: self._made_of,
            **record,
        }
        try:
            if self._locked:
                write_json(self.file, whole)
                return
            with lock_run_folder(self.file.parent):
                write_json(self.file, whole)
        except InputError as error:
            _warn(f"{error}: {self.file.name} is not kept")
        except OSError as error:
            _warn(f"{self.file}: is not kept ({error.strerror})")


def open_recency(
    counts: RecentCounts,
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    beat: Callable[[], None] | None = None,
    run: Path | None = None,
    locked: bool = False,
) -> RecencyPopularity:
    """Recency popularity with the half-life that the run keeps, or else chooses. All ranks.

    counts: of the dataset. beat: called now and then. run: its folder, where the dataset is its own;
    None: nothing is kept. locked: this process holds the folder's lock.
    """
    if run is None:
        chosen = choose_half_life(counts, dataset, ranks, config, beat)
        return RecencyPopularity(counts, chosen, config.seed)
    made_of = _describe_choice(dataset, config)
    kept = KeptRecord(run / HALF_LIFE, made_of, locked)
    unit = counts.days.unit

    def check(record: Record) -> None:
        if HalfLifeChoice.from_record(record).unit != unit:
            raise ValueError(f"its unit is {record['unit']!r}, not {unit!r}")

    record = run_on_first_rank(lambda: kept.read(check), ranks.first)
    if record is not None:
        choice = HalfLifeChoice.from_record(record)
        return RecencyPopularity(counts, choice, config.seed)
    choice = choose_half_life(counts, dataset, ranks, config, beat)
    run_on_first_rank(lambda: kept.write(choice.to_record()), ranks.first)
    return RecencyPopularity(counts, choice, config.seed)


def open_recency_term(
    trained: TrainedModel,
    counts: RecentCounts,
    advance: Advance | None = None,
    locked: bool = False,
) -> RecencyTerm:
    """The recency term that the run keeps of its best model, or else fits. Called on all ranks.

    counts: of the model's dataset; they enter the term, whichever dataset it was fitted on. advance:
    called where it is fitted. locked: this process holds the lock of the run's folder.
    """
    ranks = trained.ranks
    dataset = trained.dataset
    made_of = run_on_first_rank(lambda: _describe_fit(trained), ranks.first)
    is_own = made_of["dataset"] == dataset.fingerprint
    kept = KeptRecord(trained.run / RECENCY_TERM, made_of, locked)

    def read() -> Record | None:
        return kept.read(lambda record: _check_term(record, trained, counts))

    record = run_on_first_rank(read, ranks.first)
    if record is not None:
        weights = read_weights(record, dataset)
        return RecencyTerm(RecencyFeatures(counts), *weights)
    term = _fit_anew(trained, counts, advance)
    if is_own:
        fitted = {"unit": counts.days.unit, **term.to_record(dataset)}
        run_on_first_rank(lambda: kept.write(fitted), ranks.first)
    return term


def is_own_dataset(trained: TrainedModel) -> bool:
    """Whether the model's dataset is the one that the run was trained on. Called on all ranks."""
    own = run_on_first_rank(
        lambda: _own_fingerprint(trained), trained.ranks.first
    )
    return own == trained.dataset.fingerprint


def _fit_anew(
    trained: TrainedModel, counts: RecentCounts, advance: Advance | None
) -> RecencyTerm:
    """Fits the term on the validation split as the run has it. Called on all ranks."""
    dataset = trained.dataset
    config = trained.config
    if config.split.kind == Timeline.name and dataset.training is None:
        dataset = split_as_trained(trained.run, config, dataset, trained.ranks)
    return fit_recency_term(
        trained.model,
        trained.table,
        dataset,
        trained.ranks,
        config,
        counts,
        advance,
    )


def _describe_choice(dataset: Dataset, config: RunConfig) -> Record:
    """What a half-life is chosen by."""
    return {
        "dataset": dataset.fingerprint,
        "split": asdict(config.split),
        "seed": config.seed,
        "negatives": config.evaluation.negatives,
        "min_users": config.evaluation.min_users,
    }


def _describe_fit(trained: TrainedModel) -> Record:
    """What the term is fitted by, on the run's own dataset. Raises InputError."""
    manifest = trained.run / trained.checkpoint["folder"] / MANIFEST
    try:
        checkpoint = hashlib.sha256(manifest.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{manifest}: cannot be read ({error.strerror}): copy the run again"
        ) from None
    own = {"dataset": _own_fingerprint(trained), "checkpoint": checkpoint}
    return _describe_choice(trained.dataset, trained.config) | own


def _own_fingerprint(trained: TrainedModel) -> str:
    """The fingerprint of the dataset that the run was trained on. Raises InputError."""
    file = trained.run / trained.checkpoint["folder"] / STATE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["dataset"]
    except (OSError, *_UNREADABLE):
        raise InputError(
            f"{file}: cannot be read: copy the run again"
        ) from None


def _check_term(
    record: Record, trained: TrainedModel, counts: RecentCounts
) -> None:
    """Raises ValueError, KeyError or TypeError for a term that does not fit the model."""
    unit = counts.days.unit
    if record["unit"] != unit:
        raise ValueError(f"its unit is {record['unit']!r}, not {unit!r}")
    dataset = trained.dataset
    read_weights(record, dataset)
    names = [domain.name for domain in dataset.domains]
    fitted = set(record["domains"])
    is_own = record[_MADE_OF]["dataset"] == dataset.fingerprint
    if is_own and fitted != set(names):
        raise ValueError(f"its domains are {', '.join(sorted(fitted))}")
    unknown = [name for name in names if name not in fitted]
    if unknown:
        _warn(
            f"{trained.run / RECENCY_TERM}: has no domain {', '.join(unknown)}: "
            "scored by the model alone"
        )


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
