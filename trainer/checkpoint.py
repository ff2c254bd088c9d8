"""Checkpoints on disk: everything that the next step depends on, readable at any number of ranks and ZeRO stage.

    run/checkpoints/step-00001200/
        state.json                         RunState; the configuration and dataset that it belongs to
        dense.safetensors                  dense weights, λ, α, β
        optimizer.safetensors              the dense optimizer's state
        table-00000-of-00002.safetensors   rows of M with the fused optimizer's state, one file a rank that wrote
        metrics.jsonl                      what was logged until then
        manifest.json                      size and checksum of every other file, and which rows a table's has
    run/best.json                          names the checkpoint with the best validation

Random numbers need no state: they are drawn from (seed, step, …). A checkpoint is written under another name, each file
flushed to disk, and becomes visible by one rename; what a kill leaves under the other name is never read.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Thread

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from embeddings.storage import Ranges, ShardCopy, load_shard
from trainer.control import agree, largest
from trainer.dense import full_optimizer_state, full_state, restore_optimizer_state
from trainer.errors import InputError
from trainer.log import HEADLINE, METRICS_FILE

BEST, MANIFEST, STATE = "best.json", "manifest.json", "state.json"
DENSE, OPTIMIZER = "dense.safetensors", "optimizer.safetensors"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")  # a second one of the same step gets a number
_PASSING = (".partial", ".removed")  # still written; on its way out
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written; besides at the end, when validation finds a better model, and when asked to stop."""

    every_steps: int = 0  # 0: not by steps
    every_minutes: float = 10.0  # 0: not by time
    every_epochs: int = 1  # 0: not by epochs
    keep: int = 2  # newest ones that stay; the best one stays besides

    def __post_init__(self):
        for name in ("every_steps", "every_minutes", "every_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}: give 0 (never) or more")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}: give at least 1")


@dataclass
class RunState:
    """Where a run is. `step` is also the position in the data, in batches from the run's start."""

    step: int = 0
    validated: int = 0  # the step after which validation was last made
    best: dict | None = None  # folder, step, epoch, NDCG@10 of the best validation
    since_best: int = 0  # validations since then
    skipped_users: int = 0  # users of damaged blocks, summed over steps
    seconds: float = 0.0  # spent in the run, restarts not counted


class Damaged(Exception):
    """A checkpoint that is torn or was altered; the message names the file."""


class Checkpoints:
    """Writes a run's checkpoints while training goes on, at most one at a time; every method is called on all ranks.

    facts: what state.json says beside the RunState. A failed write ends the run with an InputError; the checkpoint before it
    stays.
    """

    def __init__(self, run: Path, keep, ranks, facts: dict, last: RunState | None = None):
        """last: the state that the run's newest checkpoint holds."""
        self.run, self.keep, self.ranks, self.facts = run, keep, ranks, facts
        self.folder = run / "checkpoints"
        self._last = None if last is None else replace(last)
        self._thread = self._error = None
        if ranks.first:  # what a kill left, perhaps of another number of ranks, must not mix with what is written
            for folder in self.folder.glob("step-*"):
                if folder.suffix in _PASSING and _NAME.fullmatch(folder.stem):
                    shutil.rmtree(folder, ignore_errors=True)

    @property
    def writing(self):
        """True while this rank writes."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, engine, table, state: RunState):
        """Copies everything to the host, and has it written. Only the copy, and a checkpoint still in flight, hold it up; where
        the host has no room for a copy, all of it does.

        Where the best validation is of this step, state.best gets the folder's name.
        """
        if self._last is not None and replace(self._last, seconds=state.seconds) == state:
            return  # it is there
        self.finish()
        same = [_number(folder)[1] + 1 for folder in checkpoints(self.run) if _number(folder)[0] == state.step]
        again = largest(max(same, default=0) if self.ranks.first else 0)  # hosts may see a shared disk late
        name = f"step-{state.step:08d}" + (f"-{again}" if again else "")
        if state.best is not None and state.best["step"] == state.step:
            state.best = state.best | {"folder": f"checkpoints/{name}"}
        self._last = replace(state)
        self._partial = self.folder / f"{name}.partial"
        shard = ShardCopy(table)
        tensors = {DENSE: full_state(engine, self.ranks.first), OPTIMIZER: full_optimizer_state(engine, self.ranks.first)}
        metrics = self.run / METRICS_FILE
        logged = metrics.stat().st_size if self.ranks.first and metrics.exists() else 0
        text = json.dumps({"format_version": FORMAT_VERSION, "state": asdict(state), **self.facts}, indent=1)
        self._thread = Thread(target=self._write, args=(shard, tensors, text, logged), daemon=True, name="checkpoint")
        self._thread.start()
        if not shard.copied:  # it is written from the table, which must stay as it is
            self.finish()

    def settle(self, writing):
        """Makes the checkpoint visible once no rank is writing any more. writing: what `agree` said."""
        if self._thread is not None and not writing:
            self._commit()

    def finish(self):
        """Waits for the checkpoint in flight."""
        if self._thread is not None:
            self._thread.join()
            self._commit()

    def _write(self, shard, tensors, text, logged):
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            names = [shard.write(self._partial)]
            if self.ranks.first:
                for name, values in tensors.items():
                    save_file(values, self._partial / name)
                (self._partial / STATE).write_text(text)
                _copy_start(self.run / METRICS_FILE, self._partial / METRICS_FILE, logged)
                names += [*tensors, STATE, METRICS_FILE]
            part = {name: _flushed(self._partial / name) for name in names}
            part[shard.name] |= shard.range
            write_json(self._partial / f"part-{self.ranks.rank:05d}.json", part)
        except BaseException as error:  # raised where all ranks meet
            self._error = error

    def _commit(self):
        self._thread = None
        troubled = agree(trouble=self._error is not None).trouble
        if not troubled:
            if self.ranks.first:
                try:
                    self._make_visible()
                except OSError as error:
                    self._error = error
            troubled = agree(trouble=self._error is not None).trouble
        if not troubled:
            return
        if self.ranks.first:
            shutil.rmtree(self._partial, ignore_errors=True)
        if self._error is not None and not isinstance(self._error, OSError | SafetensorError):
            raise self._error
        whose = "a rank's own line says why" if self._error is None else f"rank {self.ranks.rank}: {self._error}"
        raise InputError(
            f"{self._partial}: the checkpoint cannot be written ({whose}): the one before it stays good; make room, and the "
            "same command goes on from it",
            one_rank=self._error is not None,
        )

    def _make_visible(self):
        parts = sorted(self._partial.glob("part-*.json"))
        if len(parts) != self.ranks.world_size:
            raise OSError(f"{len(parts)} of {self.ranks.world_size} ranks' files are there: run=DIR must be seen by all hosts")
        files = {}
        for part in parts:
            files |= json.loads(part.read_text())
        write_json(self._partial / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        for part in parts:
            part.unlink()
        _flush_folder(self._partial)
        os.replace(self._partial, self._partial.with_suffix(""))
        _flush_folder(self.folder)
        best = self._last.best
        if best is not None and best["step"] == self._last.step:
            write_json(self.run / BEST, best)
        # Of later steps there are only damaged ones: the run went back behind them.
        own = [folder for folder in checkpoints(self.run) if _number(folder)[0] <= self._last.step]
        kept = {folder.name for folder in own[: self.keep]} | {Path((best or {}).get("folder", "")).name}
        for folder in checkpoints(self.run):
            if folder.name not in kept:
                _remove(folder)


def checkpoints(run: Path):
    """The run's checkpoints, newest first; those that are still written, or half removed, are none."""
    folder = run / "checkpoints"
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=_number, reverse=True)


def _number(folder):
    """(step, 0 or the number of a later one of the same step)."""
    step, again = _NAME.fullmatch(folder.name).groups(default="0")
    return int(step), int(again)


def newest(run: Path, ranks, say):
    """The newest whole checkpoint and what its state.json says, or (None, None). Called on all ranks, which share the reading.

    say(text): called with each checkpoint that is skipped and why, by the rank that found it.
    """
    for folder in checkpoints(run):
        facts = None
        try:
            verify(folder, ranks.rank, ranks.world_size)
            facts = read_state(folder)
        except Damaged as error:
            say(f"{error}: this checkpoint is skipped")
        if not agree(trouble=facts is None).trouble:
            return folder, facts
    return None, None


def verify(folder: Path, rank=0, ranks=1):
    """Compares every ranks-th file with the manifest, and all names and sizes. Raises Damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], dict(manifest["files"])
        expected = {str(name): (int(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in files.items()}
    except _UNREADABLE:
        raise Damaged(f"{folder / MANIFEST} is missing or unreadable") from None
    if version != FORMAT_VERSION:
        raise Damaged(f"{folder / MANIFEST} has format_version {version}, this program reads {FORMAT_VERSION}")
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if found != expected.keys():
        odd = sorted(found ^ expected.keys())[0]
        raise Damaged(f"{folder / Path(odd).name} is {'not in the manifest' if odd in found else 'missing'}")
    if missing := {STATE, DENSE, OPTIMIZER, METRICS_FILE} - found:
        raise Damaged(f"{folder / min(missing)} is missing, in the manifest too")
    for number, (name, (size, checksum)) in enumerate(sorted(expected.items())):
        file = folder / name
        try:
            if file.is_symlink() or not file.is_file():
                raise Damaged(f"{file} is no file")
            if file.stat().st_size != size:
                raise Damaged(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
            if number % ranks == rank and _checksum(file) != checksum:
                raise Damaged(f"{file} has another checksum than the manifest says")
        except OSError as error:
            raise Damaged(f"{file} cannot be read ({error.strerror})") from None


def read_state(folder: Path):
    """What a checkpoint's state.json says, "state" as a RunState. Raises Damaged."""
    file = folder / STATE
    try:
        facts = json.loads(file.read_text())
        if facts["format_version"] != FORMAT_VERSION:
            raise Damaged(f"{file} has format_version {facts['format_version']}, this program reads {FORMAT_VERSION}")
        given = facts["state"]
        kinds = {field.name: (int, float) if field.type is float else field.type for field in fields(RunState)}
        if given.keys() != kinds.keys() or not all(isinstance(given[name], kind) for name, kind in kinds.items()):
            raise Damaged(f"{file}: its state is not this program's")
        if min(given[name] for name in ("step", "validated", "since_best", "skipped_users", "seconds")) < 0:
            raise Damaged(f"{file}: its state has negative counts")
        if not isinstance(facts["config"], dict) or not isinstance(facts["dataset"], str):
            raise Damaged(f"{file}: its configuration or dataset is missing")
        _folder_of(folder.parent.parent, given["best"]) if given["best"] is not None else None
        return facts | {"state": RunState(**given)}
    except _UNREADABLE as error:
        raise Damaged(f"{file} cannot be used ({' '.join(str(error).split())})") from None


def restore_model(folder: Path, model):
    """Fills the dense model's weights, λ, α and β, before an engine is built around it. On all ranks."""
    with reading(folder):
        model.load_state_dict(dense_state(folder))


def dense_state(folder: Path) -> dict:
    """The dense model's weights and buffers in a checkpoint."""
    return load_file(folder / DENSE)


def restore_optimizers(folder: Path, engine, table):
    """Fills the table, its optimizer's state, and the dense optimizer's state. On all ranks."""
    with reading(folder):
        restore_optimizer_state(engine, load_file(folder / OPTIMIZER))
        load_shard(table, folder, table_ranges(folder))


def restore_best(folder: Path, model, table):
    """Fills model and table from a checkpoint that is whole. Called on all ranks."""
    restore_model(folder, model)
    with reading(folder):
        load_shard(table, folder, table_ranges(folder))


def table_ranges(folder: Path) -> Ranges | None:
    """Which stored rows each table file of a checkpoint holds, as its manifest says; None: it was written before they said."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    tables = {name: entry for name, entry in files.items() if name.startswith("table-")}
    if not all("first_row" in entry for entry in tables.values()):
        return None
    return {name: (int(entry["first_row"]), int(entry["rows"])) for name, entry in tables.items()}


def best_checkpoint(run: Path, ranks) -> tuple[Path, dict, dict]:
    """The folder of the run's best checkpoint, found whole, what best.json says of it, and what its state.json says. Called on
    all ranks, which share the reading."""
    folder, best = _best(run, ranks)
    try:
        return folder, best, read_state(folder)
    except Damaged as error:
        raise InputError(f"{error}: copy the run again") from None


def _best(run, ranks):
    """The folder of the best checkpoint, verified, and what best.json says."""
    try:
        best = json.loads((run / BEST).read_text())
        folder = _folder_of(run, best)
    except _UNREADABLE:
        raise InputError(f"{run}: holds no finished model ({BEST} is missing or unreadable): train first") from None
    damage = None
    try:
        verify(folder, ranks.rank, ranks.world_size)
    except Damaged as error:
        damage = str(error)
    if agree(trouble=damage is not None).trouble:
        raise InputError(f"{damage or f'{folder}: damaged'}: copy the run again", one_rank=damage is not None)
    return folder, best


def write_json(file: Path, value):
    """`write_text` of a value as JSON."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text):
    """Written beside, flushed and moved over: a reader, and a crash, see the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, file)
    _flush_folder(file.parent)


class reading:
    """Within it, what a checkpoint's files are wrong with becomes an InputError."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError | SafetensorError):
            raise InputError(f"{self._folder}: cannot be read ({error}): copy the run again") from None
        if isinstance(error, RuntimeError | ValueError | KeyError):  # weights of other shapes or names; a table of other rows
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self._folder}: its weights do not fit the run's model and dataset ({reason})") from None


def _folder_of(run, best):
    """The folder that a best.json names, which lies in the run. Raises ValueError where it is no such record."""
    kinds = {"folder": str, "step": int, "epoch": int, HEADLINE: (int, float)}
    if best.keys() != kinds.keys() or not all(isinstance(best[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"{best} is no best validation")
    place, _, name = best["folder"].partition("/")
    if place != "checkpoints" or not _NAME.fullmatch(name):
        raise ValueError(f"{best['folder']} is no checkpoint's name")
    return run / place / name


def _remove(folder):
    """Out of sight first: a folder that is half removed must not be taken for a torn checkpoint."""
    if folder.exists():
        gone = folder.with_suffix(".removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _copy_start(source, target, size):
    """The first `size` bytes of a file that others go on appending to."""
    with open(target, "wb") as copy:
        if size:
            with open(source, "rb") as file:
                copy.write(file.read(size))


def _flushed(file):
    """Flushes a file to disk; its manifest entry."""
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors' own files are for their owner alone
    _flush(file)
    return {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}


def _checksum(file):
    """XXH3 finds damage at the speed of memory; it is no signature."""
    digest, buffer = xxhash.xxh3_128(), bytearray(2**22)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _flush(file):
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
