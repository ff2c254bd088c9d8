"""Where a run begins: in an empty folder, or from the newest whole checkpoint of the same run."""

import contextlib
import functools
import hashlib
import importlib.metadata
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import torch

from trainer.checkpoint.save import (
    BEST,
    LATEST,
    RunState,
    checkpoints,
    damage_of,
    newest,
)
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

PACKAGES = ("torch", "torchrec", "deepspeed", "numpy")

# What may differ when a run goes on: it changes where things lie, how fast they go, or how far, not what a step does.
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
_MOVES_THE_RATE = (
    "epochs",
    "max_steps",
)  # where the schedule falls towards the last step
_SHOWN = 12
# Where things lie, and how they are fetched there: it may be another place on another host.
_PLACES = (
    "data",
    "run",
    "warm_start",
    *(f"stream.{field.name}" for field in fields(SourceConfig)),
)
_PROGRAM = "syncrec-trainer"
_SOURCES = ("launch", "trainer", "embeddings", "syncrec", "syncrec_kernels")
_ROOT = Path(__file__).resolve().parents[2]


def run_folder(folder, fresh=False) -> Path:
    """The run's folder: new, empty, or of a run that can go on. Raises InputError where it is none of them.

    fresh: it must not hold anything.
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
            f"{run}: already holds a run; give a new folder as run=DIR, or leave out --fresh to go on with it"
        )
    return run


def is_empty(run: Path) -> bool:
    """Whether nothing is there, or a folder that holds nothing but a lock."""
    return not run.exists() or (
        run.is_dir() and all(entry.name == LOCK for entry in run.iterdir())
    )


def require_same_start(config: RunConfig, dataset, **command) -> None:
    """Raises InputError on all ranks, and names those that differ, where they do not have the same
    dataset, settings but for places, versions, and `command`, what else the command line says.
    Called on all ranks."""
    require_same(
        {
            "another dataset": {"fingerprint": dataset.fingerprint},
            "other settings": shared_settings(config),
            "other versions": versions(),
            "another command or device": {
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                **command,
            },
        }
    )


def shared_settings(config: RunConfig) -> dict:
    """Every setting that has to be the same on all ranks, by its dotted key."""
    return {key: value for key, value in flat(config).items() if key not in _PLACES}


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries on which a step's arithmetic rests, and of this program, with a checksum of
    its files."""
    found = {}
    for package in (*PACKAGES, _PROGRAM):
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # started from a checkout
            found[package] = importlib.metadata.version(package)
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((_ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                digest.update(
                    f"{file.relative_to(_ROOT)}\n".encode() + file.read_bytes()
                )
    return found | {"the program's files": digest.hexdigest()[:16]}


def find_start(run: Path, config: RunConfig, dataset, ranks, accept_changes=False):
    """(checkpoint folder, RunState) to go on from; (None, RunState()) for the beginning. Called on all ranks.

    accept_changes: go on though the dataset or a setting that decides what is computed has changed. Raises InputError where
    they have, with a list, and where there are checkpoints and none of them is whole.
    """

    def say(text):
        print(f"rank {ranks.rank}: {text}", file=sys.stderr, flush=True)

    patience = Patience(run)
    folder, facts = newest(run, ranks, say, patience)
    if folder is None:
        damaged = by_the_first(lambda: len(checkpoints(run)), ranks.first)
        if damaged:
            raise InputError(
                f"{run}: none of its {damaged} checkpoints is whole: copy the run again, or give a new folder as run=DIR"
            )
        return None, RunState()
    changed = differences(facts, config, dataset.fingerprint)
    if changed and not accept_changes:
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise InputError(
            f"{run}: its checkpoint was made otherwise: {'; '.join(changed[:_SHOWN])}{more}: put it back, give a new folder as "
            "run=DIR, or go on with --accept-changes"
        )
    if changed and ranks.first:
        say(f"goes on though it was made otherwise: {'; '.join(changed)}")
    _look_at_best(run, folder, facts["state"], ranks, say, patience)
    return folder, facts["state"]


def _look_at_best(run, folder, state, ranks, say, patience):
    """best.json as it was when the checkpoint was written; no best where that model is not whole any more."""
    if state.best is not None and run / state.best["folder"] != folder:
        damage = damage_of(run / state.best["folder"], ranks, patience)
        if damage:
            say(
                f"{damage}: the best model so far is lost, the next validation begins anew"
            )
        if damage is not None:
            state.best = None
            state.since_best = 0

    def put_back():
        if ranks.first and state.best is not None:
            write_json(run / BEST, state.best)
        elif ranks.first:
            (run / BEST).unlink(missing_ok=True)

    on_all_ranks(put_back)


def differences(facts, config: RunConfig, fingerprint):
    """What is not as it was when the checkpoint was written, and may not change silently: a list of texts."""
    found = (
        []
        if facts["dataset"] == fingerprint
        else [f"the dataset {shown(config.data)} has other contents"]
    )
    now = flat(config)
    before = recorded_settings(facts, now)
    may_change = (
        MAY_CHANGE
        if config.optimizer.schedule == "constant"
        else set(MAY_CHANGE) - set(_MOVES_THE_RATE)
    )
    for key in sorted(before.keys() | now.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in may_change)
        if not allowed and before.get(key) != now.get(key):
            found.append(
                f"{key} was {shown_value(before, key)}, is {shown_value(now, key)}"
            )
    return found


def recorded_settings(facts, now):
    """A checkpoint's settings. Earlier versions recorded switches as `on` and `off`, which `now`,
    this run's settings, has as booleans."""
    before = dict(facts["config"])
    for key, value in now.items():
        if isinstance(value, bool) and before.get(key) in ("on", "off"):
            before[key] = before[key] == "on"
    return before


def shown_value(values, key):
    """A setting as a message has it."""
    if key not in values:
        return "not set"
    return "".join(
        letter if letter.isprintable() else " " for letter in str(values[key])[:80]
    )


def leave_nothing(run: Path):
    """Takes away what a run that could not begin has written into a folder that was empty before,
    and nothing else; a checkpoint or a model stays."""
    if (
        not run.is_dir()
        or checkpoints(run)
        or any((run / name).exists() for name in (BEST, LATEST))
    ):
        return
    for name in ("config.yaml", METRICS_FILE):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        (run / "checkpoints").rmdir()
    if is_empty(run):
        (run / LOCK).unlink(missing_ok=True)
        run.rmdir()
