"""Checkpoints read back: which one is whole, and what of it a model, a table or an optimizer gets.

Other hosts may see a checkpoint late, on a shared storage. So the first rank alone chooses the one
to go on from, and all ranks open the files that its manifest names. A listing is asked only for
checkpoints that nothing names. They are readable at any number of ranks and ZeRO stage.
"""

import contextlib
import errno
import functools
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from embeddings.checkpoint import Ranges, load_shard
from trainer.checkpoint.layout import (
    UNREADABLE,
    BestRecord,
    DamagedCheckpoint,
    JsonObject,
    ManifestEntries,
    RunState,
    StateRecord,
    best_folder,
    checkpoint_folder,
    compute_checksum,
    is_table_file,
    list_checkpoints,
    name_in_pointer,
    parse_manifest,
    read_state,
    step_and_repetition,
    unreadable_manifest,
)
from trainer.checkpoint.zero_state import (
    Tensors,
    restore_optimizer_state,
    take_average,
)
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.consensus import (
    is_true_on_any_rank,
    run_on_all_ranks,
    wait_until_all_see,
)
from trainer.errors import InputError
from trainer.files.atomic import Patience, is_transient, retry_patiently
from trainer.run_files import BEST, DENSE, LATEST, MANIFEST, OPTIMIZER

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks

_REASON_LENGTH = 300  # letters of a library's error in a message


def find_newest(
    run: Path,
    ranks: "Ranks",
    say: Callable[[str], None],
    patience: Patience | None = None,
) -> tuple[Path, StateRecord] | tuple[None, None]:
    """Finds the newest whole checkpoint and reads its state.json; (None, None) without one.

    Called on all ranks: the first one chooses, and all of them read. say(text): called with each
    checkpoint that is skipped and why, by the rank that found it. Raises InputError where a rank
    has another checkpoint than the first one, or none.
    """
    patience = patience or Patience(run)
    names = run_on_first_rank(lambda: _list_names(run), ranks.first)
    for name in names:
        folder = checkpoint_folder(run, name)
        damage = find_damage(folder, ranks, patience)
        record = None
        if damage is None:
            record, damage = _read_state_on_first(folder, ranks)
        if record is not None:
            return folder, record
        if damage:
            say(f"{damage}: this checkpoint is skipped")
    return None, None


def _list_names(run: Path) -> list[str]:
    """Lists names of the run's checkpoints, newest first.

    They are those that a listing has, and those that best.json and latest.json name.
    """
    names = {folder.name for folder in list_checkpoints(run)}
    for pointer in (BEST, LATEST):
        name = name_in_pointer(run / pointer)
        if name is not None:
            names.add(name)
    return sorted(
        names, key=lambda name: step_and_repetition(Path(name)), reverse=True
    )


def _read_state_on_first(
    folder: Path, ranks: "Ranks"
) -> tuple[StateRecord | None, str | None]:
    """Reads state.json on the first rank, for all: (record, None), or (None, the damage).

    The damage is empty on the other ranks, which have not met it.
    """
    read = functools.partial(_read_state_as_json, folder)
    record, damage = run_on_first_rank(read, ranks.first)
    if record is not None:
        record["state"] = RunState(**record["state"])
        return record, None
    if not ranks.first:
        damage = ""
    return None, damage


def _read_state_as_json(folder: Path) -> tuple[StateRecord | None, str | None]:
    """`read_state` with the RunState as JSON, or its error's message."""
    try:
        record = read_state(folder)
    except DamagedCheckpoint as error:
        return None, str(error)
    record["state"] = asdict(record["state"])
    return record, None


def find_best(
    run: Path, ranks: "Ranks"
) -> tuple[Path, BestRecord, StateRecord]:
    """Finds the run's best checkpoint whole: its folder, best.json and state.json.

    Called on all ranks: the first one chooses, and they share the reading. Raises InputError where
    there is none, or it is damaged.
    """
    patience = Patience(run)
    best = run_on_first_rank(lambda: _read_best(run, patience), ranks.first)
    folder = run / best["folder"]
    damage = find_damage(folder, ranks, patience)

    def refuse_damage() -> None:
        if damage:
            raise InputError(f"{damage}: copy the run again")

    run_on_all_ranks(refuse_damage)
    read = functools.partial(_read_state_as_json, folder)
    record, damage = run_on_first_rank(read, ranks.first)
    if record is None:
        raise InputError(f"{damage}: copy the run again")
    record["state"] = RunState(**record["state"])
    return folder, best, record


def _read_best(run: Path, patience: Patience) -> BestRecord:
    """Reads best.json. It may be late: what it names is removed once there is a better one."""
    while True:
        over = patience.over
        try:
            text = (run / BEST).read_text(encoding="utf-8")
            best = json.loads(text)
            folder = best_folder(run, best)
        except UNREADABLE:
            raise InputError(
                f"{run}: holds no finished model ({BEST} is missing or unreadable): train first"
            ) from None
        if over or (folder / MANIFEST).exists():
            return best
        patience.wait()


# Verification: the manifest, then names and sizes, then checksums.


def verify_checkpoint(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Compares every ranks-th file with the manifest, and all names and sizes. Raises Damaged."""
    try:
        text = _read_manifest(folder)
    except (OSError, UnicodeError):
        raise unreadable_manifest(folder, late=True) from None
    entries = parse_manifest(folder, text)
    _check_files(folder, entries)
    _check_checksums(folder, entries, rank, ranks)


def find_damage(folder: Path, ranks: "Ranks", patience: Patience) -> str | None:
    """Verifies a checkpoint: None where it is whole, else the damage that this rank finds.

    The damage is "" on a rank that finds none. Called on all ranks, which share the reading. What
    may only be late is looked at again while the patience lasts. Raises InputError where the first
    rank has a manifest and another one has another, or none: they see different folders.
    """
    read = functools.partial(_read_manifest_patiently, folder, patience)
    text, damage = run_on_first_rank(read, ranks.first)
    if damage is not None:
        if ranks.first:
            return damage
        return ""
    inspection = _Inspection(folder, text, ranks)
    wait_until_all_see(inspection.look, patience)
    run_on_all_ranks(inspection.refuse_other_folder)
    if inspection.damage is None:
        inspection.check_checksums()
    if is_true_on_any_rank(inspection.damage is not None):
        return inspection.damage or ""
    return None


class _Inspection:
    """One rank's verification of a checkpoint whose manifest the first rank has read."""

    def __init__(self, folder: Path, manifest: str, ranks: "Ranks"):
        self.damage: str | None = None
        self._other_folder: str | None = None
        self._folder = folder
        self._manifest = manifest
        self._ranks = ranks

    def look(self) -> str | None:
        """Compares manifest, names and sizes; returns what may only be late."""
        self.damage = None
        self._other_folder = self._compare_manifest()
        if self._other_folder is not None:
            return self._other_folder
        try:
            entries = parse_manifest(self._folder, self._manifest)
            _check_files(self._folder, entries)
        except DamagedCheckpoint as error:
            self.damage = str(error)
            if error.late:
                return self.damage
        return None

    def _compare_manifest(self) -> str | None:
        """Says where this rank's manifest is another one than the first rank's."""
        file = self._folder / MANIFEST
        if self._ranks.first:
            return None
        try:
            text = _read_manifest(self._folder)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            return f"does not see {file} ({reason})"
        if text != self._manifest:
            return f"has another {file}"
        return None

    def refuse_other_folder(self) -> None:
        """Raises InputError where the last look met another manifest."""
        if self._other_folder is not None:
            raise InputError(
                f"{self._other_folder} as the first rank has it: "
                "run=DIR has to be one folder, which all hosts see"
            )

    def check_checksums(self) -> None:
        """Reads this rank's share of the files."""
        entries = parse_manifest(self._folder, self._manifest)
        rank = self._ranks.rank
        try:
            _check_checksums(
                self._folder, entries, rank, self._ranks.world_size
            )
        except DamagedCheckpoint as error:
            self.damage = str(error)


def _read_manifest(folder: Path) -> str:
    """Reads the manifest's text. Raises OSError and UnicodeError."""
    content = (folder / MANIFEST).read_bytes()
    return content.decode()


def _read_manifest_patiently(
    folder: Path, patience: Patience
) -> tuple[str | None, str | None]:
    """Reads the manifest's text: (text, None), or (None, the damage)."""
    while True:
        over = patience.over
        try:
            text = _read_manifest(folder)
            parse_manifest(folder, text)
            return text, None
        except (OSError, UnicodeError):
            damage = str(unreadable_manifest(folder))
        except DamagedCheckpoint as error:
            damage = str(error)
            over = over or not error.late
        if over:
            return None, damage
        patience.wait()


def _check_files(folder: Path, entries: ManifestEntries) -> None:
    """Checks that the files are there, and of the size that they should have. Raises Damaged."""
    for name, entry in sorted(entries.items()):
        file = folder / name
        status = _file_status(file)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpoint(f"{file} is no file")
        if size != entry.bytes:
            message = (
                f"{file} has {size} bytes, the manifest says {entry.bytes}"
            )
            raise DamagedCheckpoint(message, late=True)


def _file_status(file: Path) -> os.stat_result:
    """Asks for a file's type and size. Raises Damaged."""
    try:
        return file.lstat()
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise DamagedCheckpoint(f"{file} is missing", late=True) from None
        message = f"{file} cannot be read ({error.strerror})"
        late = is_transient(error.errno)
        raise DamagedCheckpoint(message, late) from None


def _check_checksums(
    folder: Path, entries: ManifestEntries, rank: int, world_size: int
) -> None:
    """Reads every world_size-th file and compares its checksum. Raises Damaged."""
    patience = Patience(folder)
    for number, (name, entry) in enumerate(sorted(entries.items())):
        if number % world_size != rank:
            continue
        file = folder / name
        read = functools.partial(compute_checksum, file)
        try:
            checksum = retry_patiently(read, patience)
        except OSError as error:
            raise DamagedCheckpoint(
                f"{file} cannot be read ({error.strerror})"
            ) from None
        if checksum != entry.checksum:
            raise DamagedCheckpoint(
                f"{file} has another checksum than the manifest says"
            )


def read_table_ranges(folder: Path) -> Ranges:
    """Reads from the manifest which stored rows each table file holds.

    Example: {"table-00000-of-00002.safetensors": (0, 500), …}; None in place of (first row, rows)
    where an older manifest does not say it. Raises Damaged.
    """
    try:
        text = retry_patiently((folder / MANIFEST).read_text, Patience(folder))
    except (OSError, UnicodeError):
        raise unreadable_manifest(folder) from None
    names = sorted(parse_manifest(folder, text))
    files = json.loads(text)["files"]
    ranges = {}
    for name in names:
        if is_table_file(name):
            ranges[name] = _row_range(folder, files[name])
    return ranges


def _row_range(folder: Path, entry: JsonObject) -> tuple[int, int] | None:
    """Reads a table file's first row and number of rows from its manifest entry."""
    if "first_row" not in entry:
        return None
    try:
        first = int(entry["first_row"])
        rows = int(entry["rows"])
    except (KeyError, TypeError, ValueError, OverflowError):
        file = folder / MANIFEST
        message = f"{file} does not say which rows a table file holds"
        raise DamagedCheckpoint(message) from None
    return first, rows


# Loading, from a checkpoint that is whole.


def restore_model(folder: Path, model: torch.nn.Module) -> None:
    """Fills the dense model's weights, λ, α and β, before an engine is built around it.

    Where the run has averaged its weights, it is their average. Called on all ranks.
    """

    def fill() -> None:
        with refuse_unreadable(folder):
            model.load_state_dict(load_dense_state(folder))

    run_on_all_ranks(fill)


def restore_training_model(folder: Path, model: torch.nn.Module) -> None:
    """`restore_model` to go on with training: the weights themselves, not their average."""

    def fill() -> None:
        with refuse_unreadable(folder):
            dense, _ = _load_training_state(folder)
            model.load_state_dict(dense)

    run_on_all_ranks(fill)


def load_dense_state(folder: Path) -> Tensors:
    """Reads the dense model: its weights, or their moving average, and its buffers."""
    return load_file(folder / DENSE)


def _load_training_state(folder: Path) -> tuple[Tensors, Tensors]:
    """Reads the dense model as it is trained, and its optimizer's state."""
    dense = load_dense_state(folder)
    optimizer = load_file(folder / OPTIMIZER)
    take_average(dense, optimizer)
    return dense, optimizer


def restore_optimizers(
    folder: Path, engine: "DeepSpeedEngine", table: "ItemTable"
) -> None:
    """Fills the dense optimizer's state, the item table, and its optimizer's state.

    Called on all ranks.
    """

    def fill() -> None:
        with refuse_unreadable(folder):
            _, state = _load_training_state(folder)
            restore_optimizer_state(engine, state)
            load_shard(table, folder, read_table_ranges(folder))

    run_on_all_ranks(fill)


def restore_best(
    folder: Path, model: torch.nn.Module, table: "ItemTable"
) -> None:
    """Fills the dense model and the item table for inference. Called on all ranks."""
    restore_model(folder, model)

    def fill() -> None:
        with refuse_unreadable(folder):
            load_shard(table, folder, read_table_ranges(folder))

    run_on_all_ranks(fill)


@contextlib.contextmanager
def refuse_unreadable(folder: Path) -> Iterator[None]:
    """Within it, what is wrong with a checkpoint's files becomes an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot be read ({error}): copy the run again"
        ) from None
    except DamagedCheckpoint as error:
        raise InputError(f"{error}: copy the run again") from None
    except (RuntimeError, ValueError, KeyError) as error:
        # Weights of other shapes or names; a table of other rows.
        reason = " ".join(str(error).split())[:_REASON_LENGTH]
        raise InputError(
            f"{folder}: its weights do not fit the run's model and dataset ({reason})"
        ) from None
