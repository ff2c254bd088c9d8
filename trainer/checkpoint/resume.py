"""Resume: where a run begins, in an empty folder or at its own newest whole checkpoint."""

import contextlib
import functools
import hashlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.layout import RunState, StateRecord, list_checkpoints
from trainer.checkpoint.load import find_damage, find_newest
from trainer.config.changes import (
    is_allowed,
    may_change_on_resume,
    may_differ_by_host,
    refused_changes,
)
from trainer.config.load import flatten_config
from trainer.config.run import RunConfig
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.consensus import (
    require_same_on_all_ranks,
    run_on_all_ranks,
)
from trainer.errors import InputError
from trainer.files.atomic import Patience, write_json
from trainer.files.redact import redact_location
from trainer.run_files import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LATEST,
    LOCK,
    METRICS_FILE,
    NCCL,
    REPORT,
    SPLIT,
    STATUS,
    TENSORBOARD,
    TRACKERS,
    WANDB,
)

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset
    from trainer.distributed.process_group import Ranks

# A run's settings by their dotted keys, as `trainer.config.load.flat` gives them.
Settings = dict[str, Any]

PACKAGES = ("torch", "torchrec", "deepspeed", "numpy")

_NAMED_CHANGES = 12  # in a message
_VALUE_LENGTH = 80  # letters of a setting in a message
_PROGRAM = "syncrec-trainer"
_SOURCES = ("launch", "trainer", "embeddings", "syncrec", "syncrec_kernels")
_SOURCE_SUFFIXES = (".py", ".cpp", ".h")
_ROOT = Path(__file__).resolve().parents[2]


def check_run_folder(folder: str, fresh: bool = False) -> Path:
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
    if not (run / CONFIG).is_file():
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
    require_same_on_all_ranks(
        {
            "another dataset": {"fingerprint": dataset.fingerprint},
            "other settings": shared_settings(config),
            "other versions": list_versions(),
            "another command or device": {"device": device, **command},
        }
    )


def shared_settings(config: RunConfig) -> Settings:
    """Lists every setting that has to be the same on all ranks, by its dotted key."""
    by_host = may_differ_by_host()
    settings = {}
    for key, value in flatten_config(config).items():
        if not is_allowed(key, by_host):
            settings[key] = value
    return settings


@functools.cache
def list_versions() -> dict[str, str]:
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
    folder, record = find_newest(run, ranks, say, patience)
    if folder is None or record is None:
        damaged = run_on_first_rank(
            lambda: len(list_checkpoints(run)), ranks.first
        )
        if damaged:
            raise InputError(
                f"{run}: none of its {damaged} checkpoints is whole: "
                "copy the run again, or give a new folder as run=DIR"
            )
        return None, RunState()
    changes = list_changes(record, config, dataset.fingerprint)
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
        damage = find_damage(run / state.best["folder"], ranks, patience)
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

    run_on_all_ranks(write)


def list_changes(
    record: StateRecord, config: RunConfig, fingerprint: str
) -> list[str]:
    """Lists what has changed since the checkpoint was made, and may not change silently.

    record: what the checkpoint's state.json says. fingerprint: of the dataset.
    """
    lines = []
    if record["dataset"] != fingerprint:
        lines.append(
            f"the dataset {redact_location(config.data)} has other contents"
        )
    now = flatten_config(config)
    before = record["config"]
    constant_schedule = config.optimizer.schedule == "constant"
    allowed = may_change_on_resume(constant_schedule)
    for key in refused_changes(before, now, allowed):
        lines.append(describe_change(key, before, now))
    return lines


def describe_change(key: str, before: Settings, now: Settings) -> str:
    """Says what a setting was, and what it is now."""
    old_value = format_setting(before, key)
    new_value = format_setting(now, key)
    return f"{key} was {old_value}, is {new_value}"


def format_setting(settings: Settings, key: str) -> str:
    """Formats a setting for a message."""
    if key not in settings:
        return "not set"
    text = ""
    for letter in str(settings[key])[:_VALUE_LENGTH]:
        text += letter if letter.isprintable() else " "
    return text


def remove_failed_start(run: Path) -> None:
    """Removes what a run that could not begin has written into a folder that was empty before.

    Nothing else is removed; a checkpoint or a model stays.
    """
    if not run.is_dir() or list_checkpoints(run):
        return
    if (run / BEST).exists() or (run / LATEST).exists():
        return
    for name in (CONFIG, METRICS_FILE, REPORT, SPLIT, STATUS, TRACKERS):
        (run / name).unlink(missing_ok=True)
    for name in (NCCL, TENSORBOARD, WANDB):
        shutil.rmtree(run / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        (run / CHECKPOINTS).rmdir()
    if is_empty(run):
        (run / LOCK).unlink(missing_ok=True)
        run.rmdir()
