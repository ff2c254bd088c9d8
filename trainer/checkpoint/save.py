"""Checkpoints on disk: everything that the next step depends on, readable at any number of ranks and ZeRO stage.

    run/checkpoints/step-00001200/
        state.json                         RunState; the configuration and dataset that it belongs to
        dense.safetensors                  dense weights, λ, α, β
        optimizer.safetensors              the dense optimizer's state
        table-00000-of-00002.safetensors   rows of M with the fused optimizer's state, one file a rank that wrote
        metrics.jsonl                      what was logged until then
        manifest.json                      size and checksum of every other file, and which rows a table's has
    run/best.json                          names the checkpoint with the best validation
    run/latest.json                        names the newest one

Random numbers need no state: they are drawn from (seed, step, …). A checkpoint is written under another name, each file
flushed to disk, and becomes visible by one rename; what a kill leaves under the other name is never read.

Other hosts may see all that late. So the ranks tell the first one over the group what they have
written, the first one alone chooses the checkpoint to go on from, and everybody opens the files
that its manifest names. A listing is asked only for checkpoints that nothing names."""

import errno
import functools
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from embeddings.checkpoint import Ranges, ShardCopy, load_shard
from trainer.checkpoint.zero_state import (
    full_optimizer_state,
    full_state,
    restore_optimizer_state,
)
from trainer.distributed.agreement import by_the_first, largest
from trainer.distributed.consensus import all_see, on_all_ranks, on_any_rank
from trainer.errors import InputError
from trainer.files.atomic import (
    Patience,
    StorageLate,
    as_json,
    flush,
    passes,
    patiently,
    put_in_place,
    write_beside,
    write_json,
)
from trainer.reporting.run_log import HEADLINE
from trainer.run_files import (
    BEST,
    DENSE,
    LATEST,
    MANIFEST,
    METRICS_FILE,
    OPTIMIZER,
    STATE,
)

FORMAT_VERSION = 1  # of the manifest and its files: a model of any version is read
# Of state.json. 2: every use of the seed has bits of its own; a run that was begun before
# would go on with other users in its batches.
STATE_VERSION = 2
_NAME = re.compile(
    r"step-(\d{8,})(?:-(\d+))?"
)  # a second one of the same step gets a number
_PASSING = (".partial", ".removed")  # still written; on its way out
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


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
    """A checkpoint that is torn or was altered; the message names the file.

    late: it may only be seen late, and is to be looked at again.
    """

    def __init__(self, message, late=False):
        super().__init__(message)
        self.late = late


class Checkpoints:
    """Writes a run's checkpoints while training goes on, at most one at a time; every method is called on all ranks.

    facts: what state.json says beside the RunState. A failed write ends the run with an InputError; the checkpoint before it
    stays.
    """

    def __init__(
        self,
        run: Path,
        keep,
        ranks,
        facts: dict,
        last: RunState | None = None,
        beat: Callable[[], None] = lambda: None,
    ):
        """last: the state that the run's newest checkpoint holds. beat: called while the storage is
        waited for."""
        self.run, self.keep, self.ranks, self.facts = run, keep, ranks, facts
        self.folder = run / "checkpoints"
        self._last = None if last is None else replace(last)
        self._beat = beat
        self._thread = self._error = self._written = None
        if ranks.first:  # what a kill left
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
        if (
            self._last is not None
            and replace(self._last, seconds=state.seconds) == state
        ):
            return  # it is there
        self.finish()
        again = largest(self._begin(state.step) if self.ranks.first else 0)
        name = _name_of(state.step, again)
        if state.best is not None and state.best["step"] == state.step:
            state.best = state.best | {"folder": f"checkpoints/{name}"}
        self._last = replace(state)
        self._partial = self.folder / f"{name}.partial"
        shard = ShardCopy(table)
        tensors = {
            DENSE: full_state(engine, self.ranks.first),
            OPTIMIZER: full_optimizer_state(engine, self.ranks.first),
        }
        metrics = self.run / METRICS_FILE
        logged = metrics.stat().st_size if self.ranks.first and metrics.exists() else 0
        text = json.dumps(
            {"format_version": STATE_VERSION, "state": asdict(state), **self.facts},
            indent=1,
        )
        self._thread = Thread(
            target=self._write,
            args=(shard, tensors, text, logged),
            daemon=True,
            name="checkpoint",
        )
        self._thread.start()
        if not shard.copied:  # it is written from the table, which must stay as it is
            self.finish()

    def _begin(self, step):
        """Which one of this step it is. Its folder is begun anew: a run of another number of ranks
        may have left one that no listing has shown."""
        same = [
            _number(folder)[1] + 1
            for folder in checkpoints(self.run)
            if _number(folder)[0] == step
        ]
        again = max(same, default=0)
        while (self.folder / _name_of(step, again)).exists():  # a listing may be older
            again += 1
        shutil.rmtree(
            self.folder / f"{_name_of(step, again)}.partial", ignore_errors=True
        )
        return again

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
                _copy_start(
                    self.run / METRICS_FILE, self._partial / METRICS_FILE, logged
                )
                names += [*tensors, STATE, METRICS_FILE]
            self._written = {name: _flushed(self._partial / name) for name in names}
            self._written[shard.name] |= shard.range
        except BaseException as error:  # raised where all ranks meet
            self._error = error

    def _commit(self):
        self._thread = None
        try:
            on_all_ranks(self._without_error)
            files = self._gathered()
            patience = Patience(self.run)
            unseen = all_see(lambda: self._unseen(files), patience, self._beat)
            if unseen is not None:
                kind = StorageLate if patience.shared else InputError
                unseen = unseen or "the first rank does not see another one's file"
                raise kind(
                    self._says(
                        unseen, "run=DIR has to be one folder, which all hosts see"
                    )
                )
            on_all_ranks(
                lambda: self._make_visible(files) if self.ranks.first else None
            )
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _without_error(self):
        """Raises what writing has met on this rank."""
        error = self._error
        if error is None:
            return
        if not isinstance(error, OSError | SafetensorError):
            raise error
        number = error.errno if isinstance(error, OSError) else _os_error_of(error)
        raise (StorageLate if passes(number) else InputError)(self._says(error))

    def _says(self, reason, way_out="make room"):
        return (
            f"{self._partial}: the checkpoint cannot be written ({reason}): the one before it stays good; {way_out}, and the "
            "same command goes on from it"
        )

    def _gathered(self):
        """The manifest's entries of all ranks' files, on the first rank; sent by those who wrote
        them."""
        world = self.ranks.world_size
        entry = self._written[_table_name(self.ranks.rank, world)]
        mine = torch.tensor(
            [
                entry["bytes"],
                entry["first_row"],
                entry["rows"],
                *_halves(entry["xxh3_128"]),
            ]
        )
        rows = (
            [torch.empty_like(mine) for _ in range(world)] if self.ranks.first else None
        )
        dist.gather(mine, rows, dst=0)
        if not self.ranks.first:
            return {}
        tables = {}
        for rank, row in enumerate(rows):
            size, first_row, count, *halves = row.tolist()
            checksum = {"bytes": size, "xxh3_128": _joined(halves)}
            tables[_table_name(rank, world)] = checksum | {
                "first_row": first_row,
                "rows": count,
            }
        return self._written | tables

    def _unseen(self, files):
        """What the first rank does not see yet of what the others have written."""
        for name, entry in files.items():
            try:
                size = (self._partial / name).stat().st_size
            except OSError as error:
                return f"{name}: {error.strerror}"
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
        return None

    def _make_visible(self, files):
        folder = self._partial.with_suffix("")
        best = self._last.best
        pointers = {LATEST: {"folder": f"checkpoints/{folder.name}"}}
        if best is not None and best["step"] == self._last.step:
            pointers[BEST] = best
        beside = []
        try:
            write_json(
                self._partial / MANIFEST,
                {"format_version": FORMAT_VERSION, "files": files},
            )
            # A full disk is met before the checkpoint is seen: from then on nothing needs room.
            for name, value in pointers.items():
                beside.append(self.run / f"{name}.partial")
                write_beside(self.run / name, as_json(value))
            os.replace(self._partial, folder)
            flush(self.folder)
            for partial in beside:
                put_in_place(partial)
        except OSError as error:
            for partial in beside:
                partial.unlink(missing_ok=True)
            raise (StorageLate if passes(error.errno) else InputError)(
                self._says(error)
            ) from None
        self._tidy(folder, best)

    def _tidy(self, newest, best):
        """Takes older ones away; what cannot be taken away is in nobody's way."""
        # Of later steps there are only damaged ones: the run went back behind them.
        listed = checkpoints(self.run)
        others = [
            folder
            for folder in listed
            if _number(folder)[0] <= self._last.step and folder != newest
        ]
        kept = {newest.name, Path((best or {}).get("folder", "")).name}
        kept |= {folder.name for folder in others[: self.keep - 1]}
        for folder in listed:
            if folder.name not in kept:
                try:
                    _remove(folder)
                except OSError as error:
                    print(
                        f"{folder}: cannot be removed ({error.strerror})",
                        file=sys.stderr,
                        flush=True,
                    )


def checkpoints(run: Path):
    """The run's checkpoints, newest first, as a listing has them, which may be late; those that are
    still written, or half removed, are none."""
    folder = run / "checkpoints"
    found = (
        [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=_number, reverse=True)


def _number(folder):
    """(step, 0 or the number of a later one of the same step)."""
    step, again = _NAME.fullmatch(folder.name).groups(default="0")
    return int(step), int(again)


def _name_of(step, again):
    return f"step-{step:08d}" + (f"-{again}" if again else "")


def _known(run):
    """Names of the run's checkpoints, newest first: those that are listed, and those that best.json
    and latest.json name."""
    names = {folder.name for folder in checkpoints(run)}
    for file in (BEST, LATEST):
        try:
            place, _, name = json.loads((run / file).read_text())["folder"].partition(
                "/"
            )
        except _UNREADABLE:
            continue
        if place == "checkpoints" and _NAME.fullmatch(name):
            names.add(name)
    return sorted(names, key=lambda name: _number(Path(name)), reverse=True)


def newest(run: Path, ranks, say, patience: Patience | None = None):
    """The newest whole checkpoint and what its state.json says; (None, None) where there is none.
    Called on all ranks: the first one chooses, and all of them read.

    say(text): called with each checkpoint that is skipped and why, by the rank that found it.
    Raises InputError where a rank has another checkpoint than the first one, or none."""
    patience = patience or Patience(run)
    for name in by_the_first(lambda: _known(run), ranks.first):
        folder = run / "checkpoints" / name
        damage = damage_of(folder, ranks, patience)
        facts = None
        if damage is None:
            facts, damage = by_the_first(lambda: _facts_of(folder), ranks.first)  # noqa: B023 (called at once)
            damage = damage if ranks.first else damage and ""
        if facts is not None:
            return folder, facts | {"state": RunState(**facts["state"])}
        if damage:
            say(f"{damage}: this checkpoint is skipped")
    return None, None


def _facts_of(folder):
    """(what state.json says, None), or (None, what is wrong with it); as JSON."""
    try:
        facts = read_state(folder)
    except Damaged as error:
        return None, str(error)
    return facts | {"state": asdict(facts["state"])}, None


def damage_of(folder: Path, ranks, patience: Patience) -> str | None:
    """None where a checkpoint is whole, else what this rank finds wrong with it, "" where that is
    nothing. Called on all ranks, which share the reading.

    What may only be late is looked at again while the patience lasts. Raises InputError where the
    first rank has a manifest and another one has another, or none: they do not see the same folder.
    """
    text, damage = by_the_first(lambda: _manifest_of(folder, patience), ranks.first)
    if damage is not None:
        return damage if ranks.first else ""
    found = {}

    def look():
        found.clear()
        try:
            if not ranks.first and (folder / MANIFEST).read_bytes().decode() != text:
                found["apart"] = f"has another {folder / MANIFEST}"
        except (OSError, UnicodeError) as error:
            found["apart"] = (
                f"does not see {folder / MANIFEST} ({getattr(error, 'strerror', None) or error})"
            )
        if not found:
            try:
                _look_at_files(folder, _entries(folder, text))
            except Damaged as error:
                found["damage"] = str(error)
                return str(error) if error.late else None
        return next(iter(found.values()), None)

    all_see(look, patience)

    def refuse():
        if "apart" in found:
            raise InputError(
                f"{found['apart']} as the first rank has it: run=DIR has to be one folder, which all hosts see"
            )

    on_all_ranks(refuse)
    if not found:
        try:
            _compare_checksums(
                folder, _entries(folder, text), ranks.rank, ranks.world_size
            )
        except Damaged as error:
            found["damage"] = str(error)
    return found.get("damage", "") if on_any_rank(bool(found)) else None


def _manifest_of(folder, patience):
    """(the manifest's text, None), or (None, what is wrong with it)."""
    while True:
        over = patience.over
        try:
            text = (folder / MANIFEST).read_bytes().decode()
            _entries(folder, text)
            return text, None
        except (OSError, UnicodeError):
            damage = f"{folder / MANIFEST} is missing or unreadable"
        except Damaged as error:
            damage = str(error)
            over = over or not error.late
        if over:
            return None, damage
        patience.wait()


def verify(folder: Path, rank=0, ranks=1):
    """Compares every ranks-th file with the manifest, and all names and sizes. Raises Damaged."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
    except (OSError, UnicodeError):
        raise Damaged(
            f"{folder / MANIFEST} is missing or unreadable", late=True
        ) from None
    entries = _entries(folder, text)
    _look_at_files(folder, entries)
    _compare_checksums(folder, entries, rank, ranks)


def _entries(folder, text):
    """{name: (bytes, checksum)} of a manifest's text. Raises Damaged. Files that it does not name
    are nobody's."""
    try:
        manifest = json.loads(text)
        version, files = manifest["format_version"], dict(manifest["files"])
        expected = {
            str(name): (int(entry["bytes"]), str(entry["xxh3_128"]))
            for name, entry in files.items()
        }
    except _UNREADABLE:
        raise Damaged(
            f"{folder / MANIFEST} is missing or unreadable", late=True
        ) from None
    if version != FORMAT_VERSION:
        raise Damaged(
            f"{folder / MANIFEST} has format_version {version}, this program reads {FORMAT_VERSION}"
        )
    for name in expected:
        if (
            name != os.path.basename(name)
            or name in ("", ".", "..", MANIFEST)
            or not name.isprintable()
        ):
            raise Damaged(
                f"{folder / MANIFEST} names {name!r}, which is no file of a checkpoint"
            )
    if missing := {STATE, DENSE, OPTIMIZER, METRICS_FILE} - expected.keys():
        raise Damaged(f"{folder / min(missing)} is missing, in the manifest too")
    return expected


def _look_at_files(folder, expected):
    """Whether the files are there, and of the size that they should have. Raises Damaged."""
    for name, (size, _) in sorted(expected.items()):
        file = folder / name
        try:
            facts = file.lstat()
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise Damaged(f"{file} is missing", late=True) from None
            raise Damaged(
                f"{file} cannot be read ({error.strerror})", late=passes(error.errno)
            ) from None
        if not stat.S_ISREG(facts.st_mode):
            raise Damaged(f"{file} is no file")
        if facts.st_size != size:
            raise Damaged(
                f"{file} has {facts.st_size} bytes, the manifest says {size}", late=True
            )


def _compare_checksums(folder, expected, rank, ranks):
    """Reads every ranks-th file. Raises Damaged."""
    patience = Patience(folder)
    for number, (name, (_, checksum)) in enumerate(sorted(expected.items())):
        file = folder / name
        try:
            if (
                number % ranks == rank
                and patiently(functools.partial(_checksum, file), patience) != checksum
            ):
                raise Damaged(f"{file} has another checksum than the manifest says")
        except OSError as error:
            raise Damaged(f"{file} cannot be read ({error.strerror})") from None


def table_ranges(folder: Path) -> Ranges:
    """Which stored rows each of the table's files in a checkpoint holds, as its manifest says; None
    where it does not say, as it was before. Raises Damaged."""
    try:
        text = patiently((folder / MANIFEST).read_text, Patience(folder))
    except (OSError, UnicodeError):
        raise Damaged(f"{folder / MANIFEST} is missing or unreadable") from None
    names = sorted(_entries(folder, text))
    files = json.loads(text)["files"]
    return {
        name: _rows_of(files[name], folder)
        for name in names
        if name.startswith("table-") and name.endswith(".safetensors")
    }


def _rows_of(entry, folder):
    if "first_row" not in entry:
        return None
    try:
        return int(entry["first_row"]), int(entry["rows"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Damaged(
            f"{folder / MANIFEST} does not say which rows a table file holds"
        ) from None


def read_state(folder: Path):
    """What a checkpoint's state.json says, "state" as a RunState. Raises Damaged."""
    file = folder / STATE
    try:
        facts = json.loads(file.read_text())
        version = facts["format_version"]
        if version != STATE_VERSION:
            raise Damaged(
                f"{file} has format_version {version}, this program goes on from {STATE_VERSION}: "
                "the seed draws other batches since; begin a new run, with warm_start=RUN to keep "
                "what this one has learnt"
            )
        given = facts["state"]
        kinds = {
            field.name: (int, float) if field.type is float else field.type
            for field in fields(RunState)
        }
        if given.keys() != kinds.keys() or not all(
            isinstance(given[name], kind) for name, kind in kinds.items()
        ):
            raise Damaged(f"{file}: its state is not this program's")
        if (
            min(
                given[name]
                for name in (
                    "step",
                    "validated",
                    "since_best",
                    "skipped_users",
                    "seconds",
                )
            )
            < 0
        ):
            raise Damaged(f"{file}: its state has negative counts")
        if not isinstance(facts["config"], dict) or not isinstance(
            facts["dataset"], str
        ):
            raise Damaged(f"{file}: its configuration or dataset is missing")
        _folder_of(folder.parent.parent, given["best"]) if given[
            "best"
        ] is not None else None
        return facts | {"state": RunState(**given)}
    except _UNREADABLE as error:
        raise Damaged(
            f"{file} cannot be used ({' '.join(str(error).split())})"
        ) from None


def restore_model(folder: Path, model):
    """Fills the dense model's weights, λ, α and β, before an engine is built around it. On all ranks."""

    def fill():
        with reading(folder):
            model.load_state_dict(dense_state(folder))

    on_all_ranks(fill)


def dense_state(folder: Path) -> dict:
    """The dense model's weights and buffers in a checkpoint."""
    return load_file(folder / DENSE)


def restore_optimizers(folder: Path, engine, table):
    """Fills the table, its optimizer's state, and the dense optimizer's state. On all ranks."""

    def fill():
        with reading(folder):
            restore_optimizer_state(engine, load_file(folder / OPTIMIZER))
            load_shard(table, folder, table_ranges(folder))

    on_all_ranks(fill)


def restore_best(folder: Path, model, table):
    """Fills model and table from a checkpoint that is whole. Called on all ranks."""
    restore_model(folder, model)

    def fill():
        with reading(folder):
            load_shard(table, folder, table_ranges(folder))

    on_all_ranks(fill)


def best_checkpoint(run: Path, ranks) -> tuple[Path, dict, dict]:
    """The folder of the run's best checkpoint, found whole, what best.json says of it, and what its
    state.json says. Called on all ranks: the first one chooses, and they share the reading."""
    patience = Patience(run)
    best = by_the_first(lambda: _best(run, patience), ranks.first)
    folder = run / best["folder"]
    damage = damage_of(folder, ranks, patience)

    def refuse():
        if damage:
            raise InputError(f"{damage}: copy the run again")

    on_all_ranks(refuse)
    facts, damage = by_the_first(lambda: _facts_of(folder), ranks.first)
    if facts is None:
        raise InputError(f"{damage}: copy the run again")
    return folder, best, facts | {"state": RunState(**facts["state"])}


def _best(run, patience):
    """What best.json says. It may be late: what it names is taken away where there is a better
    one."""
    while True:
        over = patience.over
        try:
            best = json.loads((run / BEST).read_text())
            folder = _folder_of(run, best)
        except _UNREADABLE:
            raise InputError(
                f"{run}: holds no finished model ({BEST} is missing or unreadable): train first"
            ) from None
        if over or (folder / MANIFEST).exists():
            return best
        patience.wait()


class reading:
    """Within it, what a checkpoint's files are wrong with becomes an InputError."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError | SafetensorError):
            raise InputError(
                f"{self._folder}: cannot be read ({error}): copy the run again"
            ) from None
        if isinstance(error, Damaged):
            raise InputError(f"{error}: copy the run again") from None
        if isinstance(
            error, RuntimeError | ValueError | KeyError
        ):  # weights of other shapes or names; a table of other rows
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self._folder}: its weights do not fit the run's model and dataset ({reason})"
            ) from None


def _folder_of(run, best):
    """The folder that a best.json names, which lies in the run. Raises ValueError where it is no such record."""
    kinds = {"folder": str, "step": int, "epoch": int, HEADLINE: (int, float)}
    if best.keys() != kinds.keys() or not all(
        isinstance(best[name], kind) for name, kind in kinds.items()
    ):
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
    file.chmod(
        file.parent.stat().st_mode & 0o666
    )  # safetensors' own files are for their owner alone
    flush(file)
    return {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}


def _checksum(file):
    """XXH3 finds damage at the speed of memory; it is no signature."""
    digest, buffer = xxhash.xxh3_128(), bytearray(2**22)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _table_name(rank, ranks):
    return f"table-{rank:05d}-of-{ranks:05d}.safetensors"


def _halves(checksum):
    """128 bits in hexadecimal as two int64."""
    whole = bytes.fromhex(checksum)
    return [int.from_bytes(half, "big", signed=True) for half in (whole[:8], whole[8:])]


def _joined(halves):
    """The other way round."""
    return b"".join(half.to_bytes(8, "big", signed=True) for half in halves).hex()


def _os_error_of(error):
    """The number that safetensors has in its text, e.g. "I/O error: No space left on device (os
    error 28)"."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
