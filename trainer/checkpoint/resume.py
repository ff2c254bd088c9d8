"""Resume: where a run begins, in an empty folder or at its own newest whole checkpoint."""

import contextlib
import functools
import hashlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.layout import (
    BEST,
    LATEST,
    RunState,
    StateRecord,
    checkpoints,
)
from trainer.checkpoint.load import damage_of, newest
from trainer.config.load import flat
from trainer.config.run import RunConfig
from trainer.config.stream import SourceConfig
from trainer.distributed.agreement import by_the_first
from trainer.distributed.consensus import on_all_ranks, require_same
from trainer.distributed.run_lock import LOCK
from trainer.errors import InputError
from trainer.files.atomic import Patience, write_json
from trainer.files.redact import shown
from trainer.reporting.run_log import METRICS_FILE

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset
    from trainer.distributed.process_group import Ranks

# A run's settings by their dotted keys, as `trainer.config.load.flat` gives them.
Settings = dict[str, Any]

PACKAGES = ("torch", "torchrec", "deepspeed", "numpy")

# What may differ when a run is resumed: it changes where things lie, how fast they go, or how far,
# not what a step does.
MAY_CHANGE = (
    "data",
    "run",
    "timeout_minutes",
    "deterministic",
    "epochs",
    "max_steps",
    "log",
    "checkpoint",
    "table.placement",
    "table.cache_share",
    "table.device_share",
    "stream.workers",
    "stream.prefetch",
    "stream.verify",
    "stream.damaged",
    *(f"stream.{field.name}" for field in fields(SourceConfig)),
    "evaluation.batch_size",
    "evaluation.every_epochs",
    "evaluation.patience",
    "optimizer.zero_stage",
    "deepspeed.zero_optimization",
)
# Where the schedule falls towards the last step, these move the learning rate.
_MOVES_THE_RATE = ("epochs", "max_steps")
_NAMED_CHANGES = 12  # in a message
_VALUE_LENGTH = 80  # letters of a setting in a message
# Where things lie, and how they are fetched there: it may be another location on another host.
_LOCATIONS = (
    "data",
    "run",
    "warm_start",
    *(f"stream.{field.name}" for field in fields(SourceConfig)),
)
_PROGRAM = "syncrec-trainer"
_SOURCES = ("launch", "trainer", "embeddings", "syncrec", "syncrec_kernels")
_SOURCE_SUFFIXES = (".py", ".cpp", ".h")
_ROOT = Path(__file__).resolve().parents[2]


def run_folder(folder: str, fresh: bool = False) -> Path:
    """Checks the run's folder: new, empty, or of a run that can go on.

    fresh: it must not hold anything. Raises InputError where it is none of them.
    """
    if not folder:
        raise InputError(
            "run=DIR is missing: the folder that gets everything this run writes"
        )
    run = Path(folder)
    try:
        if is_empty(run):
            return run
    except OSError as error:
        raise InputError(
            f"{run}: cannot be read ({error.strerror}): give another folder as run=DIR"
        ) from None
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run}: already holds something that is no run; give a new folder as run=DIR"
        )
    if fresh:
        raise InputError(
            f"{run}: already holds a run; give a new folder as run=DIR, "
            "or leave out --fresh to go on with it"
        )
    return run


def is_empty(run: Path) -> bool:
    """Whether there is no such folder, or one that holds nothing but a lock."""
    if not run.exists():
        return True
    return run.is_dir() and all(entry.name == LOCK for entry in run.iterdir())


def require_same_start(
    config: RunConfig, dataset: "Dataset", **command: object
) -> None:
    """Raises InputError on all ranks, and names those that differ, where their starts differ.

    Compared are the dataset, settings but for locations, versions, and `command`, what else the
    command line says. Called on all ranks.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    require_same(
        {
            "another dataset": {"fingerprint": dataset.fingerprint},
            "other settings": shared_settings(config),
            "other versions": versions(),
            "another command or device": {"device": device, **command},
        }
    )


def shared_settings(config: RunConfig) -> Settings:
    """Lists every setting that has to be the same on all ranks, by its dotted key."""
    settings = {}
    for key, value in flat(config).items():
        if key not in _LOCATIONS:
            settings[key] = value
    return settings


@functools.cache
def versions() -> dict[str, str]:
    """Lists the versions on which a step's arithmetic rests.

    They are those of the libraries and of this program, with a checksum of its files.
    """
    by_name = {}
    for package in (*PACKAGES, _PROGRAM):
        # The program has no version where it is started from a checkout.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_name[package] = importlib.metadata.version(package)
    by_name["the program's files"] = _compute_source_checksum()
    return by_name


def _compute_source_checksum() -> str:
    """Computes a checksum of the program's source files, names included."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((_ROOT / folder).rglob("*")):
            if file.suffix in _SOURCE_SUFFIXES:
                name = file.relative_to(_ROOT)
                digest.update(f"{name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def find_start(
    run: Path,
    config: RunConfig,
    dataset: "Dataset",
    ranks: "Ranks",
    accept_changes: bool = False,
) -> tuple[Path | None, RunState]:
    """Finds the checkpoint to resume from: its folder, and the state of the run in it.

    Without one it returns (None, RunState()). Called on all ranks. accept_changes: go on though the
    dataset or a setting that decides what is computed has changed. Raises InputError where they
    have, with a list, and where there are checkpoints and none of them is whole.
    """

    def say(text: str) -> None:
        print(f"rank {ranks.rank}: {text}", file=sys.stderr, flush=True)

    patience = Patience(run)
    folder, record = newest(run, ranks, say, patience)
    if folder is None:
        damaged = by_the_first(lambda: len(checkpoints(run)), ranks.first)
        if damaged:
            raise InputError(
                f"{run}: none of its {damaged} checkpoints is whole: "
                "copy the run again, or give a new folder as run=DIR"
            )
        return None, RunState()
    changes = differences(record, config, dataset.fingerprint)
    if changes and not accept_changes:
        raise InputError(
            f"{run}: its checkpoint was made otherwise: {_shorten(changes)}: put it back, "
            "give a new folder as run=DIR, or go on with --accept-changes"
        )
    if changes and ranks.first:
        say(f"goes on though it was made otherwise: {'; '.join(changes)}")
    state = record["state"]
    _restore_best_record(run, folder, state, ranks, say, patience)
    return folder, state


def _shorten(changes: list[str]) -> str:
    """Joins the first changes for a message, and counts the others."""
    text = "; ".join(changes[:_NAMED_CHANGES])
    if len(changes) > _NAMED_CHANGES:
        text += f"; and {len(changes) - _NAMED_CHANGES} more"
    return text


def _restore_best_record(
    run: Path,
    folder: Path,
    state: RunState,
    ranks: "Ranks",
    say: Callable[[str], None],
    patience: Patience,
) -> None:
    """Writes best.json as it was when the checkpoint was made.

    Where the best model is not whole any more, the state forgets it.
    """
    if state.best is not None and run / state.best["folder"] != folder:
        damage = damage_of(run / state.best["folder"], ranks, patience)
        if damage:
            say(
                f"{damage}: the best model so far is lost, the next validation begins anew"
            )
        if damage is not None:
            state.best = None
            state.since_best = 0

    def write() -> None:
        if not ranks.first:
            return
        if state.best is not None:
            write_json(run / BEST, state.best)
        else:
            (run / BEST).unlink(missing_ok=True)

    on_all_ranks(write)


def differences(record: StateRecord, config: RunConfig, fingerprint: str) -> list[str]:
    """Lists what has changed since the checkpoint was made, and may not change silently.

    record: what the checkpoint's state.json says. fingerprint: of the dataset.
    """
    lines = []
    if record["dataset"] != fingerprint:
        lines.append(f"the dataset {shown(config.data)} has other contents")
    now = flat(config)
    before = recorded_settings(record, now)
    may_change = set(MAY_CHANGE)
    if config.optimizer.schedule != "constant":
        may_change -= set(_MOVES_THE_RATE)
    for key in sorted(before.keys() | now.keys()):
        changed = before.get(key) != now.get(key)
        if changed and not is_listed(key, may_change):
            lines.append(describe_change(key, before, now))
    return lines


def recorded_settings(record: StateRecord, now: Settings) -> Settings:
    """A checkpoint's settings. Earlier versions recorded switches as `on` and `off`, which `now`,
    this run's settings, has as booleans."""
    before = dict(record["config"])
    for key, value in now.items():
        if isinstance(value, bool) and before.get(key) in ("on", "off"):
            before[key] = before[key] == "on"
    return before


def describe_change(key: str, before: Settings, now: Settings) -> str:
    """Says what a setting was, and what it is now."""
    old_value = shown_value(before, key)
    new_value = shown_value(now, key)
    return f"{key} was {old_value}, is {new_value}"


def is_listed(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key, or a section that it is in, is among the names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def shown_value(settings: Settings, key: str) -> str:
    """Formats a setting for a message."""
    if key not in settings:
        return "not set"
    text = ""
    for letter in str(settings[key])[:_VALUE_LENGTH]:
        text += letter if letter.isprintable() else " "
    return text


def leave_nothing(run: Path) -> None:
    """Removes what a run that could not begin has written into a folder that was empty before.

    Nothing else is removed; a checkpoint or a model stays.
    """
    if not run.is_dir() or checkpoints(run):
        return
    if (run / BEST).exists() or (run / LATEST).exists():
        return
    for name in ("config.yaml", METRICS_FILE):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        (run / "checkpoints").rmdir()
    if is_empty(run):
        (run / LOCK).unlink(missing_ok=True)
        run.rmdir()
