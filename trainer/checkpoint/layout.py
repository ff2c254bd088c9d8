"""A checkpoint's folder: the names of its files, its manifest, and the state of the run in it.

    run/checkpoints/step-00001200/
        state.json                         RunState; the configuration and dataset it belongs to
        dense.safetensors                  dense weights, λ, α, β
        optimizer.safetensors              the dense optimizer's state
        table-00000-of-00002.safetensors   rows of M with the fused optimizer's state, one file
                                           a rank that wrote
        metrics.jsonl                      what was logged until then
        manifest.json                      size and checksum of every other file, and which rows
                                           a table file has
    run/best.json                          names the checkpoint with the best validation
    run/latest.json                        names the newest one

Random numbers need no state: they are drawn from (seed, step, …). `trainer.checkpoint.save`
writes such a folder, `trainer.checkpoint.load` reads it.
"""

import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from trainer.run_files import (
    CHECKPOINTS,
    DENSE,
    HEADLINE,
    MANIFEST,
    METRICS_FILE,
    OPTIMIZER,
    STATE,
)

FORMAT_VERSION = (
    1  # of the manifest and its files: a model of any version is read
)
# Of state.json. 2: every use of the seed has bits of its own; a run that was begun before
# would go on with other users in its batches.
STATE_VERSION = 2

# What reading a JSON file of somebody else may raise.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)

# A second checkpoint of the same step gets a number.
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_COUNTS = ("step", "validated", "since_best", "skipped_users", "seconds")
_CHECKSUM_BUFFER = 2**22  # bytes

JsonObject = dict[str, Any]
# What a state.json says: format_version, state, config, dataset, …
StateRecord = JsonObject
# What best.json says: folder, step, epoch and NDCG@10 of the best validation.
BestRecord = JsonObject


@dataclass
class RunState:
    """Where a run is. `step` is also the position in the data, in batches from the start."""

    step: int = 0
    validated: int = 0  # the step after which validation was last made
    best: dict | None = (
        None  # folder, step, epoch, NDCG@10 of the best validation
    )
    since_best: int = 0  # validations since then
    skipped_users: int = 0  # users of damaged blocks, summed over steps
    seconds: float = 0.0  # spent in the run, restarts not counted
    # The domains that count in the mean by which the best model is chosen: those of the first
    # validation, so that all of them compare alike.
    mean_domains: list | None = None


@dataclass(frozen=True)
class ManifestEntry:
    """What a manifest says of one file."""

    bytes: int
    checksum: str


ManifestEntries = dict[str, ManifestEntry]  # by the files' names


class DamagedCheckpoint(Exception):
    """A checkpoint that is torn or was altered; the message names the file.

    late: the storage may only show it late, so it is to be looked at again.
    """

    def __init__(self, message: str, late: bool = False):
        super().__init__(message)
        self.late = late


def list_checkpoints(run: Path) -> list[Path]:
    """Lists the run's checkpoints, newest first.

    Folders that are still written, or half removed, are left out. A listing may be late.
    """
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    folders = []
    for entry in folder.iterdir():
        if is_checkpoint_name(entry.name):
            folders.append(entry)
    folders.sort(key=step_and_repetition, reverse=True)
    return folders


def checkpoint_folder(run: Path, name: str) -> Path:
    """Returns where a checkpoint of that name lies."""
    return run / CHECKPOINTS / name


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder's name is that of a whole checkpoint."""
    return _NAME.fullmatch(name) is not None


def step_and_repetition(folder: Path) -> tuple[int, int]:
    """Parses a checkpoint's name: its step, and above 0 for later ones of the same step."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} has no name of a checkpoint")
    step, repetition = match.groups(default="0")
    return int(step), int(repetition)


def is_table_file(name: str) -> bool:
    """Whether a file of that name holds rows of the item table."""
    return name.startswith("table-") and name.endswith(".safetensors")


def relative_folder(name: str) -> str:
    """Returns a checkpoint's folder as best.json and latest.json name it."""
    return f"{CHECKPOINTS}/{name}"


def name_in_pointer(file: Path) -> str | None:
    """Reads best.json or latest.json; returns the name of its checkpoint, None without one."""
    try:
        pointer = json.loads(file.read_text(encoding="utf-8"))
        return _name_in_folder(pointer["folder"])
    except UNREADABLE:
        return None


def _name_in_folder(folder: str) -> str:
    """Returns the checkpoint's name in what `relative_folder` gave. Raises ValueError."""
    parent, _, name = folder.partition("/")
    if parent != CHECKPOINTS or not is_checkpoint_name(name):
        raise ValueError(f"{folder} is no checkpoint's name")
    return name


def best_folder(run: Path, best: BestRecord) -> Path:
    """Returns the folder that a best.json names, which lies in the run.

    Raises ValueError where it is no such record.
    """
    kinds = {"folder": str, "step": int, "epoch": int, HEADLINE: (int, float)}
    if not _has_kinds(best, kinds):
        raise ValueError(f"{best} is no best validation")
    name = _name_in_folder(best["folder"])
    return checkpoint_folder(run, name)


def parse_manifest(folder: Path, text: str) -> ManifestEntries:
    """Parses a manifest's text. Raises Damaged. Files that it does not name are ignored."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        files = dict(manifest["files"])
        entries = {}
        for name, entry in files.items():
            entries[str(name)] = _parse_entry(entry)
    except UNREADABLE:
        raise unreadable_manifest(folder, late=True) from None
    if version != FORMAT_VERSION:
        raise DamagedCheckpoint(
            f"{file} has format_version {version}, this program reads {FORMAT_VERSION}"
        )
    for name in entries:
        if not _is_file_name(name):
            raise DamagedCheckpoint(
                f"{file} names {name!r}, which is no file of a checkpoint"
            )
    missing = {STATE, DENSE, OPTIMIZER, METRICS_FILE} - entries.keys()
    if missing:
        raise DamagedCheckpoint(
            f"{folder / min(missing)} is missing, in the manifest too"
        )
    return entries


def _parse_entry(entry: JsonObject) -> ManifestEntry:
    """Parses what a manifest says of a file."""
    size = int(entry["bytes"])
    checksum = str(entry["xxh3_128"])
    return ManifestEntry(size, checksum)


def unreadable_manifest(folder: Path, late: bool = False) -> DamagedCheckpoint:
    """Makes the error for a manifest that cannot be read."""
    return DamagedCheckpoint(
        f"{folder / MANIFEST} is missing or unreadable", late
    )


def _is_file_name(name: str) -> bool:
    """Whether a manifest may name a file so: no path, nothing that steers a terminal."""
    if name != os.path.basename(name) or not name.isprintable():
        return False
    return name not in ("", ".", "..", MANIFEST)


def read_state(folder: Path) -> StateRecord:
    """Reads a checkpoint's state.json, "state" as a RunState. Raises Damaged."""
    file = folder / STATE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        _check_version(file, record["format_version"])
        # Earlier versions did not have the last one.
        state = {"mean_domains": None, **record["state"]}
        _check_state(file, state)
        has_config = isinstance(record["config"], dict)
        has_dataset = isinstance(record["dataset"], str)
        if not has_config or not has_dataset:
            raise DamagedCheckpoint(
                f"{file}: its configuration or dataset is missing"
            )
        best = state["best"]
        if best is not None:
            run = folder.parent.parent
            best_folder(run, best)
        record["state"] = RunState(**state)
        return record
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DamagedCheckpoint(f"{file} cannot be used ({reason})") from None


def _check_version(file: Path, version: object) -> None:
    """Checks that this program goes on from a state.json of that version."""
    if version != STATE_VERSION:
        raise DamagedCheckpoint(
            f"{file} has format_version {version}, this program goes on from {STATE_VERSION}: "
            "the seed draws other batches since; begin a new run, with warm_start=RUN to keep "
            "what this one has learnt"
        )


def _check_state(file: Path, state: JsonObject) -> None:
    """Checks that a JSON object can become a RunState."""
    kinds = {}
    for field in fields(RunState):
        kinds[field.name] = field.type
        if field.type is float:
            kinds[field.name] = (int, float)
    if not _has_kinds(state, kinds):
        raise DamagedCheckpoint(f"{file}: its state is not this program's")
    for name in _COUNTS:
        if state[name] < 0:
            raise DamagedCheckpoint(f"{file}: its state has negative counts")


def _has_kinds(values: JsonObject, kinds: JsonObject) -> bool:
    """Whether a JSON object has these keys, each with a value of its kind."""
    if values.keys() != kinds.keys():
        return False
    return all(isinstance(values[name], kind) for name, kind in kinds.items())


def compute_checksum(file: Path) -> str:
    """Computes a file's XXH3, which finds damage at the speed of memory; it is no signature."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(_CHECKSUM_BUFFER)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            content = memoryview(buffer)[:count]
            digest.update(content)
    return digest.hexdigest()
