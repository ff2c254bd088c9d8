"""A prepared dataset: what `dataset.json` says of it, and where its files are.

    DIR/dataset.json
    DIR/vocabulary/<domain number>.parquet   item_id, row (int64, row of the item matrix M),
                                             count (int64, training part)
    DIR/users.parquet                        user_id, user (int64, 0..U-1)
    DIR/lengths.npy                          uint16 (U, D): interactions of the training part by
                                             user and domain, 65,535 at most
    DIR/shards/000000.tar ...                WebDataset tars of blocks of users, see `shards.py`

The folder may lie elsewhere and be fetched file by file on demand (`source.py`):
`Dataset.local` gives a file's path.

A domain owns the rows [start, start + room) of M, of which the first `items` are taken. The
files are of the leave-one-out split: a user with at least `trainer.data.split.SPLIT_LENGTH` interactions
has the last one as test and the last but one as validation (SyNCRec, section 5.3). Training
sees the rest. A shorter user is trained on whole and never evaluated. A run may split by time
instead (trainer/data/loading/timeline.py): its `Dataset` then has that `split` and `training`.

Two domains, four users, whose histories are rows of M, oldest first:

    domain 0 owns the rows 0 … 4, domain 1 the rows 5 … 8

    user  history        training part   validation, test   lengths_UD
    0     [2, 5, 0, 6]   [2, 5]          0, 6               [1, 1]
    1     [7]            [7]             too short          [0, 1]
    2     [1, 1, 3]      [1]             1, 3               [1, 0]
    3     [5, 8]         [5, 8]          too short          [0, 2]
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trainer.config.prepare import (
    DATES,
    NUMBERS,
    TIE_ORDERS,
    TIME_UNITS,
    UNKNOWN,
)
from trainer.config.stream import SourceConfig
from trainer.data.log_times import LogTimes, guess_unit
from trainer.data.remote.cache import Cache
from trainer.data.remote.source import Address
from trainer.data.split import LEAVE_ONE_OUT, AnySplit
from trainer.errors import InputError
from trainer.files.open_files import explain_unreadable
from trainer.files.redact import find_local_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

# 2: each block of a shard has a checksum of its own; 3: compact blocks, lengths.npy, checksums
# of all files; 4: times; 5: the order of equal times, and the kind of times
FORMAT_VERSION = 5
# Says nothing of them; equal times of a user are in the order of (domain, id of the item).
_VERSION_WITHOUT_TIES = 4
_SINCE_TIES = ("tie_order", "tied_users", "time_kind", "time_unit")
FILE_NAME = "dataset.json"
USERS = "users.parquet"
LENGTHS = "lengths.npy"
LENGTHS_DTYPE = np.dtype("<u2")
TICKS = 2**16 - 1  # from the first time of the logs to the last
# Fields that dataset.json does not have.
_NOT_STORED = ("folder", "cache", "split", "training")
_INT32_MAX = 2**31 - 1
_GLOB_CHARACTERS = frozenset("*?[]{}")


@dataclass(frozen=True)
class Domain:
    """One domain: its rows of M, and its users, interactions and lengths per user.

    All parts of the split are counted together.
    """

    name: str
    start: int
    items: int
    room: int
    users: int
    interactions: int
    length_percentiles: dict[str, int]
    vocabulary: str

    @property
    def rows(self) -> np.ndarray:
        """Its items' rows of M, int64 (items,), rising."""
        return np.arange(self.start, self.start + self.items)


@dataclass(frozen=True)
class Shard:
    """One tar: the users [first_user, first_user + users), the file's bytes and sha256."""

    name: str
    users: int
    first_user: int
    interactions: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class File:
    """Any other file of the dataset: its size in bytes and its sha256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> "File":
        """Reads the size and the sha256 of a file in the folder."""
        path = folder / name
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(name, path.stat().st_size, sha256)


@dataclass(frozen=True)
class TrainingCounts:
    """What the training part of a split by time has, in place of what the files say.

    lengths: uint16 (U, D), as `Dataset.lengths`. item_counts: int32 (num_embeddings,), as
    `Dataset.item_counts`. targets: {part: int64 (U + 1,)}, how many targets the users before each
    user have, where a user may have several. without_history: {part: events that would be targets, if
    anything of the user came before them}.
    """

    lengths: np.ndarray
    item_counts: np.ndarray
    targets: dict[str, np.ndarray]
    without_history: dict[str, int]


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    folder: holds the files. Those of a dataset that lies elsewhere come there through `cache`.
    too_short: users with fewer than `SPLIT_LENGTH` interactions.
    first_time, last_time: those of the logs, in the logs' own unit (dates: microseconds since
    1970).
    block_users: users of each block of a shard but for the last, which has the rest.
    files: all but the shards and `dataset.json`.
    tie_order: of a user's events at the same time, see `tie_order.py`. tied_users: of those who are
    split, how many have the same time in their newest two events. time_kind, time_unit: see
    `LogTimes`. All None in a dataset of format version 4, which does not say.
    split: what is held out. training: what is left then, where it is not what the files say.
    """

    folder: Path
    seed: int
    users: int
    interactions: int
    too_short: int
    max_length: int
    first_time: float
    last_time: float
    block_users: int
    streams: int
    domains: tuple[Domain, ...]
    shards: tuple[Shard, ...]
    files: tuple[File, ...]
    tie_order: str | None = None
    tied_users: int | None = None
    time_kind: str | None = None
    time_unit: str | None = None
    cache: Cache | None = dataclasses.field(default=None, compare=False)
    split: AnySplit = dataclasses.field(default=LEAVE_ONE_OUT, compare=False)
    training: TrainingCounts | None = dataclasses.field(
        default=None, compare=False
    )

    @property
    def place(self) -> str:
        """The dataset's location for messages: its folder, or its address without secrets."""
        if self.cache:
            return str(self.cache.address)
        return str(self.folder)

    @property
    def num_embeddings(self) -> int:
        """Rows of the item matrix M, the room for later items included."""
        last_domain = self.domains[-1]
        return last_domain.start + last_domain.room

    @property
    def log_times(self) -> LogTimes:
        """The kind of the logs' times. A dataset of format version 4 does not say it."""
        if self.time_kind is None or self.time_unit is None:
            return LogTimes(UNKNOWN, guess_unit(self.last_time))
        return LogTimes(self.time_kind, self.time_unit)

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each domain, int64 (D,), rising."""
        starts = [domain.start for domain in self.domains]
        return np.array(starts, dtype=np.int64)

    def ticks(self, times: np.ndarray) -> np.ndarray:
        """Quantizes times of the logs (any shape) to uint16.

        `first_time` is 0, `last_time` 65,535; earlier and later times are clipped to these.

        With times from 100 to 200:

            times      [90, 100, 200, 300]
            returns    [0, 0, 65535, 65535]
        """
        return quantize_times(times, self.first_time, self.last_time)

    def time_of(self, tick: int) -> float:
        """The first time, in the logs' unit, that `ticks` makes a tick of, 0 to 65,535.

        With times from 100 to 200:

            tick       0      32768    65535
            returns    100    150.0    200
        """
        span = self.last_time - self.first_time
        time = self.first_time + span * tick / TICKS
        # Rounding may lead into the tick before.
        while self.ticks(np.array(time)) < tick and time < self.last_time:
            time = float(np.nextafter(time, np.inf))
        return time

    @cached_property
    def drawn_rows(self) -> list[np.ndarray] | None:
        """The rows of M of each domain that negatives are drawn from, int64, rising.

        None: all items of the domain. Of a split by time those that the training part has
        (`is_trained`): that the others exist is not known then.
        """
        if self.training is None:
            return None
        rows_of_domains = []
        for domain in self.domains:
            end = domain.start + domain.items
            counts = self.item_counts[domain.start : end]
            rows_of_domains.append(domain.start + np.flatnonzero(counts))
        return rows_of_domains

    @cached_property
    def drawn_items(self) -> np.ndarray:
        """How many items of each domain negatives are drawn from, int64 (D,)."""
        items = [domain.items for domain in self.domains]
        if self.drawn_rows is not None:
            items = [len(rows) for rows in self.drawn_rows]
        return np.array(items, np.int64)

    def is_trained(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row of M is of an item that is ranked, bool, of any shape.

        Of a split by time an item that the training part has. By leave-one-out every item is.
        """
        if self.training is None:
            return np.ones(np.shape(rows), bool)
        return self.training.item_counts[rows] > 0

    def domain_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the domain numbers, int64, of an array of rows of M (any shape).

        In the example of the module's head:

            rows       [2, 5, 0, 6]
            returns    [0, 1, 0, 1]
        """
        return np.searchsorted(self.starts, rows, side="right") - 1

    def domain_number(self, name: str) -> int:
        """Returns the number of the domain with a name.

        Raises InputError, which names the dataset's domains.
        """
        names = [domain.name for domain in self.domains]
        if name not in names:
            raise InputError(
                f"domain {name!r} is not in the dataset {self.place}; "
                f"it has {', '.join(names)}"
            )
        return names.index(name)

    def local(self, file: str) -> Path:
        """Returns the path of a shard or another file by its name in `dataset.json`.

        A file that lies elsewhere is fetched. A fetched shard stays at least until the same
        thread asks for its next one, and for whoever has it open.
        Raises FetchFailed, an InputError: the file could not be fetched; InputError: the cache
        cannot be written.
        """
        if self.cache:
            return self.cache.local(file)
        return self.folder / file

    def ahead(self, shards: Iterable[str]) -> None:
        """Prefetches shards that lie elsewhere.

        shards: names of those that this process will read next. The first few are fetched
        meanwhile.
        """
        if self.cache:
            self.cache.ahead(shards)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Interactions of each user's training part by domain, uint16 (U, D); 65,535 at most.

        The file is mapped, not read into memory. Raises InputError where it cannot be read.
        """
        if self.training is not None:
            return self.training.lengths
        path = self.local(LENGTHS)
        try:
            lengths = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise explain_unreadable(
                path, error, "copy it again or prepare the dataset again"
            ) from None
        except (ValueError, EOFError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; prepare the dataset again"
            ) from None
        shape = (self.users, len(self.domains))
        if lengths.shape != shape or lengths.dtype != LENGTHS_DTYPE:
            raise InputError(
                f"{path} is {lengths.dtype} {lengths.shape}: prepare the dataset again"
            )
        return lengths

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Popularity: interactions of each row of M in the training part.

        int32 (num_embeddings,). At most 2³¹ − 1, and 0 for rows kept for later items. The
        vocabularies are read once in a process. Not to be written to.
        Raises InputError where a vocabulary cannot be read, or does not fit the dataset.
        """
        if self.training is not None:
            return self.training.item_counts
        counts = np.zeros(self.num_embeddings, np.int32)
        for domain in self.domains:
            path = self.local(domain.vocabulary)
            items = _read_item_counts(path, counts)
            if items != domain.items:
                raise InputError(
                    f"{path} has {items} items, {FILE_NAME} says {domain.items}: "
                    "prepare the dataset again"
                )
        counts.flags.writeable = False
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the contents of `dataset.json`: equal for equal data in any folder."""
        return hashlib.sha256(self._as_json().encode()).hexdigest()

    def _as_json(self) -> str:
        plain = dataclasses.replace(self, cache=None, training=None)
        record = dataclasses.asdict(plain)
        for name in _NOT_STORED:
            del record[name]
        version = FORMAT_VERSION
        ties = {name: record.pop(name) for name in _SINCE_TIES}
        if self.tie_order is None:
            version = _VERSION_WITHOUT_TIES
            ties = {}
        record = {"format_version": version, **ties, **record}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    def save(self) -> None:
        """Writes `dataset.json` into the folder."""
        (self.folder / FILE_NAME).write_text(self._as_json(), encoding="utf-8")

    @classmethod
    def load(
        cls,
        place: str | Path,
        check_shards: bool = True,
        source_config: SourceConfig | None = None,
        check_contents: bool = True,
    ) -> "Dataset":
        """Reads `dataset.json`, and checks that every file it names is there.

        place: a folder, or an address (see `source.Address`). Of an address `dataset.json` is
        fetched anew, and the files that every run needs if they are not in the cache. Users and
        shards are fetched on demand.
        check_shards: refuse a shard that is missing or of another size. Without it damaged
        shards can be skipped. Ignored for an address.
        check_contents: read all files but the shards, and compare their sha256, else their
        sizes alone. One process of a host is enough to do so. Of an address each process
        compares what it opens.
        Raises InputError: not a dataset folder, unreadable JSON, another format version, a
        field missing or of another type, users or rows that do not add up, a name that leads
        out of the folder, a file missing or of another size, no shard at all; an address that
        cannot be used, or a file that cannot be fetched.
        """
        location = str(place)
        local_folder = find_local_folder(location)
        if local_folder is None:
            return cls._load_remote(
                Address(location, source_config or SourceConfig())
            )
        folder = Path(local_folder)
        path = folder / FILE_NAME
        if not path.is_file():
            raise InputError(
                f"{folder} is not a dataset folder (no {FILE_NAME} in it): "
                "make one with launch/prepare.py"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise explain_unreadable(
                path, error, "prepare the dataset again"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; prepare the dataset again"
            ) from None
        dataset = cls._parse(record, path, folder)
        dataset._check_files(path, check_shards, check_contents)
        return dataset

    @classmethod
    def _load_remote(cls, address: Address) -> "Dataset":
        record = address.read_json(FILE_NAME)
        shown = address.shown(FILE_NAME)
        dataset = cls._parse(record, shown, Path())
        cache = Cache(
            address, dataset.fingerprint, dataset.shards, dataset.files
        )
        dataset = dataclasses.replace(dataset, folder=cache.folder, cache=cache)
        for file in dataset.files:
            # The users' file is large, and needed for the results of single users alone.
            if file.name != USERS:
                dataset.local(file.name)
        return dataset

    @classmethod
    def _parse(
        cls,
        record: Any,
        path: Path | str,
        folder: Path,
    ) -> "Dataset":
        """Makes a Dataset of the JSON in `path`, and checks all that needs no other file."""
        version = None
        if isinstance(record, dict):
            version = record.pop("format_version", None)
        if version == _VERSION_WITHOUT_TIES:
            for name in _SINCE_TIES:
                record[name] = record.get(name)
        elif version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {version}, "
                f"this program reads {FORMAT_VERSION}: prepare the dataset again"
            )
        record["domains"] = _parse_records(Domain, record, "domains", path)
        record["shards"] = _parse_records(Shard, record, "shards", path)
        record["files"] = _parse_records(File, record, "files", path)
        dataset = _parse_record(
            cls,
            record,
            path,
            folder=folder,
            cache=None,
            split=LEAVE_ONE_OUT,
            training=None,
        )
        dataset._check_tie_order(path, version)
        dataset._check_sums(path)
        dataset._check_limits(path)
        dataset._check_names(path)
        return dataset

    def _check_tie_order(self, path: Path | str, version: int) -> None:
        """Raises InputError for an order of equal times, or a kind of times, that is none."""
        units = (*TIME_UNITS, UNKNOWN)
        is_known = {
            "tie_order": self.tie_order in TIE_ORDERS,
            "tied_users": self.tied_users is not None,
            "time_kind": self.time_kind in (DATES, NUMBERS),
            "time_unit": self.time_unit in units,
        }
        for name in _SINCE_TIES:
            value = getattr(self, name)
            if version == _VERSION_WITHOUT_TIES:
                is_known[name] = value is None
            if not is_known[name]:
                raise InputError(
                    f"{path}: {name} is {value!r}: prepare the dataset again"
                )

    def _check_sums(self, path: Path | str) -> None:
        """Raises InputError where domains, users and interactions do not add up."""
        row_ranges = [(domain.start, domain.room) for domain in self.domains]
        user_ranges = [(shard.first_user, shard.users) for shard in self.shards]
        adds_up = (
            bool(self.domains)
            and bool(self.shards)
            and _tiles(row_ranges)
            and _tiles(user_ranges, self.users)
        )
        for domain in self.domains:
            if not 1 <= domain.items <= domain.room:
                adds_up = False
        interactions = sum(shard.interactions for shard in self.shards)
        if interactions != self.interactions:
            adds_up = False
        if not adds_up:
            raise InputError(
                f"{path}: domains, users or interactions do not add up: "
                "prepare the dataset again"
            )

    def _check_limits(self, path: Path | str) -> None:
        """Raises InputError for times, blocks, streams or sizes that cannot be."""
        if not self.first_time <= self.last_time:
            raise InputError(
                f"{path}: times from {self.first_time} to {self.last_time}: "
                "prepare the dataset again"
            )
        if not (self.block_users >= 1 and 1 <= self.streams <= self.users):
            raise InputError(
                f"{path}: {self.block_users} users a block, "
                f"{self.streams} streams for {self.users} users: "
                "prepare the dataset again"
            )
        if max(self.users, self.num_embeddings) > _INT32_MAX:
            raise InputError(
                f"{path}: more users or rows than int32 can number: "
                "prepare the dataset again"
            )

    def _check_names(self, path: Path | str) -> None:
        """Raises InputError for file names that lead out of the folder or are not known."""
        vocabularies = [domain.vocabulary for domain in self.domains]
        shard_names = [shard.name for shard in self.shards]
        file_names = [file.name for file in self.files]
        for name in vocabularies + shard_names + file_names:
            if not is_inside_folder(name):
                raise InputError(
                    f"{path}: {name!r} is no name of a file in this folder: "
                    "prepare the dataset again"
                )
        expected_names = [USERS, LENGTHS, *vocabularies]
        if sorted(file_names) != sorted(expected_names):
            raise InputError(
                f"{path}: the files it names are not those of a dataset: "
                "prepare the dataset again"
            )

    def _check_files(
        self,
        path: Path,
        check_shards: bool,
        check_contents: bool,
    ) -> None:
        """Raises InputError where a file is missing, of another size or other contents."""
        for file in self.files:
            self._check_size(file)
            if check_contents and _read_file(self.folder, file.name) != file:
                raise InputError(
                    f"{self.folder / file.name}: "
                    f"its sha256 is not the one in {FILE_NAME}: "
                    "copy it again or prepare the dataset again"
                )
        shard_paths = [self.folder / shard.name for shard in self.shards]
        if not any(path.is_file() for path in shard_paths):
            raise InputError(
                f"{path}: not one of its {len(self.shards)} shards is there: "
                "copy them again"
            )
        if check_shards:
            for shard in self.shards:
                self._check_size(shard)

    def _check_size(self, record: File | Shard) -> None:
        file = self.folder / record.name
        if not file.is_file():
            raise InputError(
                f"{file} is missing: copy it again or prepare the dataset again"
            )
        size = file.stat().st_size
        if size != record.bytes:
            raise InputError(
                f"{file} has {size} bytes, {FILE_NAME} says {record.bytes}: "
                "copy it again or prepare the dataset again"
            )


def _read_file(folder: Path, name: str) -> File:
    """What a file is. Raises InputError where it cannot be read."""
    try:
        return File.of(folder, name)
    except OSError as error:
        raise explain_unreadable(
            folder / name,
            error,
            "copy it again or prepare the dataset again",
        ) from None


def quantize_times(
    times: np.ndarray,
    first: float,
    last: float,
) -> np.ndarray:
    """Quantizes times, see `Dataset.ticks`."""
    least_span = np.finfo(np.float64).tiny
    span = max(last - first, least_span)
    share = (np.asarray(times, np.float64) - first) / span
    ticks = np.clip(share, 0, 1) * TICKS
    return ticks.astype(np.uint16)


def is_inside_folder(name: str) -> bool:
    """Returns whether a file's name leads to no place outside its folder, and is no glob.

    Only the name is judged: a file in the folder may be a link to elsewhere, which is its
    owner's choice.
    """
    path = PurePosixPath(name)
    if path.name == "" or path.is_absolute() or ".." in path.parts:
        return False
    # DuckDB would look for others where a name has glob characters.
    return name.isprintable() and not _GLOB_CHARACTERS.intersection(name)


def _read_item_counts(path: Path, counts: np.ndarray) -> int:
    """Reads a vocabulary's counts into `counts`, by row; returns how many items it has."""
    import pyarrow as pa  # not for the settings, which are imported with this module
    import pyarrow.parquet as pq

    items = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["row", "count"]):
                count = np.minimum(batch["count"].to_numpy(), _INT32_MAX)
                counts[batch["row"].to_numpy()] = count
                items += len(batch)
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        pa.ArrowException,
    ) as error:
        if isinstance(error, OSError):
            raise explain_unreadable(
                path, error, "prepare the dataset again"
            ) from None
        raise InputError(
            f"{path} cannot be read: {error}; prepare the dataset again"
        ) from None
    return items


def _tiles(ranges: list[tuple[int, int]], end: int | None = None) -> bool:
    """Returns whether ranges (start, length) follow one another from 0, to `end` if given."""
    position = 0
    for start, length in ranges:
        if start != position or length < 1:
            return False
        position += length
    return end is None or position == end


def _parse_records(
    kind: type[Record],
    record: dict[str, Any],
    name: str,
    path: Path | str,
) -> tuple[Record, ...]:
    """Makes dataclasses of the list in a field."""
    values = record.get(name)
    if not isinstance(values, list):
        raise InputError(
            f"{path}: the field {name!r} is missing or no list: "
            "prepare the dataset again"
        )
    return tuple(_parse_record(kind, value, path) for value in values)


def _parse_record(
    kind: type[Record], record: Any, path: Path | str, **extra: Any
) -> Record:
    """Makes one dataclass from JSON, with every field but `extra` there and of its type.

    Unknown fields are refused too.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"{path}: a {kind.__name__} is written as {record!r}: "
            "prepare the dataset again"
        )
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in extra:
        del types[name]
    for name, annotation in types.items():
        if name not in record:
            raise InputError(
                f"{path}: {kind.__name__} lacks the field {name!r}: "
                "prepare the dataset again"
            )
        value = record[name]
        value_type: Any = getattr(annotation, "__origin__", annotation)
        if not isinstance(value, value_type) or isinstance(value, bool):
            raise InputError(
                f"{path}: {kind.__name__}.{name} is {value!r}: "
                "prepare the dataset again"
            )
    for name in record:
        if name not in types:
            raise InputError(
                f"{path}: {kind.__name__} has no field {name!r}: "
                "prepare the dataset again"
            )
    return kind(**record, **extra)
