"""Checkpoints written while training goes on, in two phases: all ranks write, then one rename.

Each rank copies its part to the host and a thread writes it, flushed to disk, into a folder under
another name (`.partial`). Once no rank is writing, the ranks tell the first one over the group what
they have written. It sees all files, writes the manifest, and makes the checkpoint visible by one
rename. What a kill leaves under the other name is never read.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from embeddings.checkpoint import ShardCopy
from trainer.checkpoint.layout import (
    FORMAT_VERSION,
    STATE_VERSION,
    BestRecord,
    JsonObject,
    RunState,
    compute_checksum,
    is_checkpoint_name,
    list_checkpoints,
    relative_folder,
    step_and_repetition,
)
from trainer.checkpoint.zero_state import (
    Tensors,
    gather_optimizer_state,
    gather_state,
    put_average,
)
from trainer.distributed.agreement import max_of_ranks
from trainer.distributed.consensus import run_on_all_ranks, wait_until_all_see
from trainer.errors import InputError
from trainer.files.atomic import (
    LateStorage,
    Patience,
    flush,
    is_transient,
    json_text,
    rename_partial,
    write_beside,
    write_json,
)
from trainer.run_files import (
    BEST,
    CHECKPOINTS,
    DENSE,
    LATEST,
    MANIFEST,
    METRICS_FILE,
    OPTIMIZER,
    STATE,
    checkpoint_name,
    table_file,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks

_WRITTEN = ".partial"  # a folder that is still written
_REMOVED = ".removed"  # a folder on its way out
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# A file's entry in the manifest: bytes, xxh3_128; of a table file first_row and rows too.
Entry = JsonObject
Entries = dict[str, Entry]  # by the files' names


def _do_nothing(*_: object) -> None:
    pass


class Checkpoints:
    """Writes a run's checkpoints while training goes on, at most one at a time.

    Every method is called on all ranks. A failed write ends the run with an InputError; the
    checkpoint before it stays.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        ranks: "Ranks",
        origin: JsonObject,
        newest_state: RunState | None = None,
        beat: Callable[[], None] = _do_nothing,
        on_written: Callable[[RunState, Path], None] = _do_nothing,
    ):
        """keep: how many of the newest stay beside the best one.

        origin: what state.json says beside the RunState. newest_state: what the run's newest
        checkpoint holds. beat: called while the storage is waited for. on_written(state, folder):
        called on all ranks once a checkpoint is visible.
        """
        self.run = run
        self.keep = keep
        self.ranks = ranks
        self.origin = origin
        self.folder = run / CHECKPOINTS
        self._newest_state = None
        if newest_state is not None:
            self._newest_state = replace(newest_state)
        self._beat = beat
        self._on_written = on_written
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._entries: Entries = {}
        if ranks.first:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes what a kill has left."""
        for folder in self.folder.glob("step-*"):
            is_leftover = folder.suffix in (_WRITTEN, _REMOVED)
            if is_leftover and is_checkpoint_name(folder.stem):
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def writing(self) -> bool:
        """True while this rank writes."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, engine: "DeepSpeedEngine", table: "ItemTable", state: RunState
    ) -> None:
        """Copies everything to the host, and starts the thread that writes it.

        Training waits for the copy and for a checkpoint still in flight. Where the host has no
        room for a copy, it waits for all of it. Where the best validation is of this step,
        state.best gets the folder's name.
        """
        if self._is_saved(state):
            return
        self.finish()
        repetition = 0
        if self.ranks.first:
            repetition = self._prepare_folder(state.step)
        name = checkpoint_name(state.step, max_of_ranks(repetition))
        best = _best_of_own_step(state)
        if best is not None:
            state.best = best | {"folder": relative_folder(name)}
        self._state = replace(state)
        self._newest_state = self._state
        self._partial = self.folder / f"{name}{_WRITTEN}"
        shard = ShardCopy(table)
        tensors = {
            DENSE: gather_state(engine, self.ranks.first),
            OPTIMIZER: gather_optimizer_state(engine, self.ranks.first),
        }
        put_average(tensors[DENSE], tensors[OPTIMIZER])
        record = {
            "format_version": STATE_VERSION,
            "state": asdict(state),
            **self.origin,
        }
        text = json.dumps(record, indent=1)
        self._thread = Thread(
            target=self._write,
            args=(shard, tensors, text, self._logged_bytes()),
            daemon=True,
            name="checkpoint",
        )
        self._thread.start()
        # It is written from the table, which must stay as it is.
        if not shard.copied:
            self.finish()

    def _is_saved(self, state: RunState) -> bool:
        """Whether the newest checkpoint holds this state; time alone is no reason for another."""
        if self._newest_state is None:
            return False
        return replace(self._newest_state, seconds=state.seconds) == state

    def _prepare_folder(self, step: int) -> int:
        """Chooses the repetition of this step, and clears the folder to write.

        A run of another number of ranks may have left one that no listing has shown.
        """
        repetition = 0
        for folder in list_checkpoints(self.run):
            listed_step, listed_repetition = step_and_repetition(folder)
            if listed_step == step:
                repetition = max(repetition, listed_repetition + 1)
        # A listing may be older.
        while (self.folder / checkpoint_name(step, repetition)).exists():
            repetition += 1
        name = checkpoint_name(step, repetition)
        shutil.rmtree(self.folder / f"{name}{_WRITTEN}", ignore_errors=True)
        return repetition

    def _logged_bytes(self) -> int:
        """Returns how much of metrics.jsonl belongs to the checkpoint."""
        metrics = self.run / METRICS_FILE
        if not self.ranks.first or not metrics.exists():
            return 0
        return metrics.stat().st_size

    def settle(self, writing: bool) -> None:
        """Makes the checkpoint visible once no rank writes any more.

        writing: whether any rank does, the same on all ranks.
        """
        if self._thread is not None and not writing:
            self._commit()

    def finish(self) -> None:
        """Waits for the checkpoint in flight."""
        if self._thread is not None:
            self._thread.join()
            self._commit()

    # The first phase: each rank writes its files, in a thread.

    def _write(
        self,
        shard: ShardCopy,
        tensors: dict[str, Tensors],
        text: str,
        logged_bytes: int,
    ) -> None:
        """Writes and flushes this rank's files. An error is raised where all ranks meet."""
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            names = [shard.write(self._partial)]
            if self.ranks.first:
                for name, values in tensors.items():
                    save_file(values, self._partial / name)
                state = self._partial / STATE
                state.write_text(text, encoding="utf-8")
                metrics = self._partial / METRICS_FILE
                _copy_start(self.run / METRICS_FILE, metrics, logged_bytes)
                names += [*tensors, STATE, METRICS_FILE]
            entries = {}
            for name in names:
                entries[name] = _flush_file(self._partial / name)
            entries[shard.name] |= shard.range
            self._entries = entries
        except BaseException as error:
            self._error = error

    # The second phase: the ranks agree, and the first one makes the checkpoint visible.

    def _commit(self) -> None:
        """Makes the checkpoint visible once its files are seen; discards it on an error."""
        self._thread = None
        try:
            run_on_all_ranks(self._raise_error)
            entries = self._gather_entries()
            self._await_files(entries)
            run_on_all_ranks(lambda: self._publish(entries))
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        self._on_written(replace(self._state), self._partial.with_suffix(""))

    def _raise_error(self) -> None:
        """Raises what writing has met on this rank."""
        error = self._error
        if error is None:
            return
        if not isinstance(error, OSError | SafetensorError):
            raise error
        raise self._write_error(error, _os_error_number(error))

    def _write_error(
        self, error: OSError | SafetensorError, number: int | None
    ) -> InputError:
        """Makes the error for a failed write. number: the operating system's."""
        if is_transient(number):
            return LateStorage(self._message(error))
        return InputError(self._message(error))

    def _message(self, reason: object, way_out: str = "make room") -> str:
        """Says that this checkpoint is not written, why, and what to do."""
        return (
            f"{self._partial}: the checkpoint cannot be written ({reason}): "
            f"the one before it stays good; {way_out}, and the same command goes on from it"
        )

    def _gather_entries(self) -> Entries:
        """Gathers the manifest's entries of all ranks' files on the first rank; empty elsewhere."""
        world_size = self.ranks.world_size
        own_file = table_file(self.ranks.rank, world_size)
        entry = self._entries[own_file]
        numbers = [entry["bytes"], entry["first_row"], entry["rows"]]
        numbers += _halve(entry["xxh3_128"])
        row = torch.tensor(numbers)
        if not self.ranks.first:
            dist.gather(row, None, dst=0)
            return {}
        rows = [torch.empty_like(row) for _ in range(world_size)]
        dist.gather(row, rows, dst=0)
        tables = {}
        for rank, gathered in enumerate(rows):
            numbers = gathered.tolist()
            size, first_row, count, *halves = numbers
            name = table_file(rank, world_size)
            tables[name] = {
                "bytes": size,
                "xxh3_128": _join(halves),
                "first_row": first_row,
                "rows": count,
            }
        return self._entries | tables

    def _await_files(self, entries: Entries) -> None:
        """Waits until the first rank sees the files of all ranks, which a storage may show late."""
        patience = Patience(self.run)
        unseen = wait_until_all_see(
            lambda: self._find_unseen(entries), patience, self._beat
        )
        if unseen is None:
            return
        unseen = unseen or "the first rank does not see another one's file"
        message = self._message(
            unseen, "run=DIR has to be one folder, which all hosts see"
        )
        if patience.shared:
            raise LateStorage(message)
        raise InputError(message)

    def _find_unseen(self, entries: Entries) -> str | None:
        """Says which of the written files this rank does not see yet."""
        for name, entry in entries.items():
            file = self._partial / name
            written = entry["bytes"]
            try:
                size = file.stat().st_size
            except OSError as error:
                return f"{name}: {error.strerror}"
            if size != written:
                return f"{name} has {size} bytes, {written} were written"
        return None

    def _publish(self, entries: Entries) -> None:
        """Makes the checkpoint visible, on the first rank, and removes older ones."""
        if not self.ranks.first:
            return
        folder = self._partial.with_suffix("")
        latest = {"folder": relative_folder(folder.name)}
        pointers = {LATEST: latest}
        best = _best_of_own_step(self._state)
        if best is not None:
            pointers[BEST] = best
        partials = []
        try:
            manifest = {"format_version": FORMAT_VERSION, "files": entries}
            write_json(self._partial / MANIFEST, manifest)
            # A full disk is met before the checkpoint is seen: from then on nothing needs room.
            for name, value in pointers.items():
                partials.append(self.run / f"{name}.partial")
                write_beside(self.run / name, json_text(value))
            os.replace(self._partial, folder)
            flush(self.folder)
            for partial in partials:
                rename_partial(partial)
        except OSError as error:
            for partial in partials:
                partial.unlink(missing_ok=True)
            raise self._write_error(error, error.errno) from None
        self._remove_older(folder)

    def _remove_older(self, newest_folder: Path) -> None:
        """Removes all but the newest ones and the best; one that cannot be removed stays."""
        listed = list_checkpoints(self.run)
        older = []
        for folder in listed:
            step, _ = step_and_repetition(folder)
            # Of later steps there are only damaged ones: the run went back behind them.
            if step <= self._state.step and folder != newest_folder:
                older.append(folder)
        retained = {newest_folder.name}
        for folder in older[: self.keep - 1]:
            retained.add(folder.name)
        best = self._state.best
        if best is not None:
            best_path = Path(best.get("folder", ""))
            retained.add(best_path.name)
        for folder in listed:
            if folder.name not in retained:
                _try_to_remove(folder)


def _best_of_own_step(state: RunState) -> BestRecord | None:
    """The best validation where it is that of the state's own step."""
    if state.best is not None and state.best["step"] == state.step:
        return state.best
    return None


def _try_to_remove(folder: Path) -> None:
    """Removes a checkpoint; says so where it cannot be removed."""
    try:
        _remove(folder)
    except OSError as error:
        message = f"{folder}: cannot be removed ({error.strerror})"
        print(message, file=sys.stderr, flush=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint, out of sight first.

    A folder that is half removed must not be taken for a torn checkpoint.
    """
    if folder.exists():
        removed = folder.with_suffix(_REMOVED)
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _copy_start(source: Path, target: Path, size: int) -> None:
    """Copies the first `size` bytes of a file that others go on appending to."""
    with open(target, "wb") as copy:
        if size:
            with open(source, "rb") as file:
                copy.write(file.read(size))


def _flush_file(file: Path) -> Entry:
    """Flushes a file to disk, and makes its manifest entry."""
    # Safetensors' own files are for their owner alone.
    folder_mode = file.parent.stat().st_mode
    file.chmod(folder_mode & 0o666)
    flush(file)
    size = file.stat().st_size
    return {"bytes": size, "xxh3_128": compute_checksum(file)}


def _halve(checksum: str) -> list[int]:
    """Splits 128 bits in hexadecimal into two int64."""
    whole = bytes.fromhex(checksum)
    half = len(whole) // 2
    high = int.from_bytes(whole[:half], "big", signed=True)
    low = int.from_bytes(whole[half:], "big", signed=True)
    return [high, low]


def _join(halves: list[int]) -> str:
    """Joins two int64 to 128 bits in hexadecimal."""
    high, low = halves
    whole = b""
    for half in (high, low):
        whole += half.to_bytes(8, "big", signed=True)
    return whole.hex()


def _os_error_number(error: OSError | SafetensorError) -> int | None:
    """Returns the operating system's error number.

    Safetensors has it in its text: "I/O error: No space left on device (os error 28)".
    """
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    if match is None:
        return None
    return int(match[1])
