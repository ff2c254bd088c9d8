"""What a prepared dataset is: the facts in `dataset.json`, and nothing about how they came to be.

    DIR/dataset.json
    DIR/vocabulary/<domain number>.parquet   item_id, row (int64, row of the item matrix M), count (int64, training part)
    DIR/users.parquet                        user_id, user (int64, 0..U-1)
    DIR/lengths.npy                          uint16 (U, D): interactions of the training part by user and domain, 65,535 at most
    DIR/shards/000000.tar ...                WebDataset tars of blocks of users, see `shards.py`

The folder may lie elsewhere and be fetched file by file as it is needed (`source.py`): `Dataset.local` gives a file's path.

A domain owns the rows [start, start + room) of M, of which the first `items` are taken. The split is one rule
everywhere: a user with at least `SPLIT_LENGTH` interactions has the last one as test and the last but one as validation
(SyNCRec, section 5.3), and training sees the rest; a shorter user is trained on whole and never evaluated.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from trainer.config.stream import SourceConfig
from trainer.data.remote.cache import Cache
from trainer.data.remote.source import Address
from trainer.errors import InputError
from trainer.files.open_files import NoDescriptors, is_lack
from trainer.files.redact import folder_of

# 2: each block of a shard has a checksum of its own; 3: compact blocks, lengths.npy, checksums of all files; 4: times
FORMAT_VERSION = 4
FILE_NAME = "dataset.json"
USERS, LENGTHS = "users.parquet", "lengths.npy"
LENGTHS_DTYPE = np.dtype("<u2")
SPLIT_LENGTH = 3
TICKS = 2**16 - 1  # from the first time of the logs to the last
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Domain:
    """One domain: its rows of M, and its users, interactions and lengths per user, all parts of the split together."""

    name: str
    start: int
    items: int
    room: int
    users: int
    interactions: int
    length_percentiles: dict[str, int]
    vocabulary: str


@dataclass(frozen=True)
class Shard:
    """One tar: the users [first_user, first_user + users), its size in bytes and the sha256 of the file."""

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
        """The facts of a file that is there."""
        with open(folder / name, "rb") as stream:
            return cls(
                name,
                (folder / name).stat().st_size,
                hashlib.file_digest(stream, "sha256").hexdigest(),
            )


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `too_short` counts the users with fewer than `SPLIT_LENGTH` interactions; `block_users` are the
    users of each block of a shard, but for the last, which has the rest; `files` are all but the shards and `dataset.json`;
    `first_time` and `last_time` are those of the logs, in the logs' own unit (dates: microseconds since 1970).

    `folder` holds the files; those of a dataset that lies elsewhere come there through `cache`.
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
    cache: Cache | None = dataclasses.field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where the dataset lies, for messages: its folder, or its address without what is secret in it."""
        return str(self.cache.address if self.cache else self.folder)

    @property
    def num_embeddings(self) -> int:
        """Rows of the item matrix M, the room for later items included."""
        return self.domains[-1].start + self.domains[-1].room

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each domain, int64 (D,), rising."""
        return np.array([domain.start for domain in self.domains], dtype=np.int64)

    def ticks(self, times) -> np.ndarray:
        """When, uint16: times of the logs (any shape) from `first_time`, 0, to `last_time`, 65,535; what is earlier or later
        is as these."""
        return ticks_of(times, self.first_time, self.last_time)

    def domain_of(self, rows) -> np.ndarray:
        """Domain numbers, int64, of an array of rows of M (any shape)."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def domain_number(self, name: str) -> int:
        """The number of the domain of that name. Raises InputError, with the names that there are."""
        names = [domain.name for domain in self.domains]
        if name not in names:
            raise InputError(
                f"domain {name!r} is not in the dataset {self.place}; it has {', '.join(names)}"
            )
        return names.index(name)

    def local(self, file) -> Path:
        """Where a shard or another file of the dataset can be read, by its name in `dataset.json`; fetched, if need be.

        A shard that was fetched stays at least until the same thread asks for its next one, and for whoever has it open. Raises
        NotFetched, an InputError: it could not be had; InputError: the cache cannot be written.
        """
        return self.cache.local(file) if self.cache else self.folder / file

    def ahead(self, shards: Iterable[str]) -> None:
        """Names the shards that this process will read next: where they lie elsewhere, the first few are fetched meanwhile."""
        if self.cache:
            self.cache.ahead(shards)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Interactions of each user's training part by domain, uint16 (U, D), mapped from the disk; 65,535 at most."""
        path = self.local(LENGTHS)
        try:
            lengths = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            if is_lack(error):
                raise NoDescriptors(path, error) from None
            raise InputError(
                f"{path} cannot be read: {error}: copy it again or prepare the dataset again"
            ) from None
        except (ValueError, EOFError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; prepare the dataset again"
            ) from None
        if (
            lengths.shape != (self.users, len(self.domains))
            or lengths.dtype != LENGTHS_DTYPE
        ):
            raise InputError(
                f"{path} is {lengths.dtype} {lengths.shape}: prepare the dataset again"
            )
        return lengths

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Interactions of each row of M in the training part, int32 (num_embeddings,), 2³¹ − 1 at most, 0 for rows kept for
        later items: read from the vocabularies once in this process, whoever asks. Not to be written to.

        Raises InputError where a vocabulary cannot be read, or does not fit the dataset.
        """
        import pyarrow as pa  # not for the settings, which are imported with this module
        import pyarrow.parquet as pq

        counts = np.zeros(self.num_embeddings, np.int32)
        for domain in self.domains:
            path = self.local(domain.vocabulary)
            items = 0
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(columns=["row", "count"]):
                        counts[batch["row"].to_numpy()] = np.minimum(
                            batch["count"].to_numpy(), _INT32_MAX
                        )
                        items += len(batch)
            except (
                OSError,
                ValueError,
                KeyError,
                IndexError,
                pa.ArrowException,
            ) as error:
                if isinstance(error, OSError) and is_lack(error):
                    raise NoDescriptors(path, error) from None
                raise InputError(
                    f"{path} cannot be read: {error}; prepare the dataset again"
                ) from None
            if items != domain.items:
                raise InputError(
                    f"{path} has {items} items, {FILE_NAME} says {domain.items}: prepare the dataset again"
                )
        counts.flags.writeable = False
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the contents of `dataset.json`: equal for equal data wherever the folder lies."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def _text(self):
        facts = dataclasses.asdict(dataclasses.replace(self, cache=None))
        del facts["folder"], facts["cache"]
        return (
            json.dumps(
                {"format_version": FORMAT_VERSION, **facts},
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    def save(self) -> None:
        """Writes `dataset.json` into the folder."""
        (self.folder / FILE_NAME).write_text(self._text(), encoding="utf-8")

    @classmethod
    def load(
        cls,
        place: str | Path,
        check_shards: bool = True,
        source_config: SourceConfig | None = None,
        check_contents: bool = True,
    ) -> "Dataset":
        """Reads what a dataset is, and checks that every file it names is there.

        place: a folder, or an address as `source.Address` has them. Of an address `dataset.json` is fetched anew, and the files
        that every run needs where they are not here yet; users and shards when they are asked for.
        check_shards: refuse a shard that is missing or of another size; left out where damaged shards are to be skipped, and
        where the dataset lies elsewhere.
        check_contents: read all files but the shards, and compare their sha256; left out, their sizes alone are compared. One
        process of a host is enough to do so. Of an address each process compares what it opens.
        Raises InputError: not a dataset folder, unreadable JSON, another format version, a field missing or of another
        type, users or rows that do not add up, a name that leads out of the folder, a file missing or of another size,
        no shard at all; an address that cannot be used, or what lies there cannot be fetched.
        """
        place = str(place)
        if (named := folder_of(place)) is None:
            return cls._load_from(Address(place, source_config or SourceConfig()))
        folder = Path(named)
        path = folder / FILE_NAME
        if not path.is_file():
            raise InputError(
                f"{folder} is not a dataset folder (no {FILE_NAME} in it): make one with launch/prepare.py"
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read: {error}; prepare the dataset again"
            ) from None
        dataset = cls._from_facts(facts, path, folder)
        dataset._check_files(path, check_shards, check_contents)
        return dataset

    @classmethod
    def _load_from(cls, address):
        dataset = cls._from_facts(
            address.read_json(FILE_NAME), address.shown(FILE_NAME), Path()
        )
        cache = Cache(address, dataset.fingerprint, dataset.shards, dataset.files)
        dataset = dataclasses.replace(dataset, folder=cache.folder, cache=cache)
        for file in dataset.files:
            if (
                file.name != USERS
            ):  # large, and wanted for the results of single users alone
                dataset.local(file.name)
        return dataset

    @classmethod
    def _from_facts(cls, facts, path, folder):
        version = facts.pop("format_version", None) if isinstance(facts, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {version}, this program reads {FORMAT_VERSION}: prepare the dataset again"
            )
        facts["domains"] = tuple(
            _record(Domain, fact, path) for fact in _list(facts, "domains", path)
        )
        facts["shards"] = tuple(
            _record(Shard, fact, path) for fact in _list(facts, "shards", path)
        )
        facts["files"] = tuple(
            _record(File, fact, path) for fact in _list(facts, "files", path)
        )
        dataset = _record(cls, facts, path, folder=folder, cache=None)
        dataset._check_facts(path)
        return dataset

    def _check_facts(self, path):
        def tiles(ranges, end):
            position = 0
            for start, length in ranges:
                if start != position or length < 1:
                    return False
                position += length
            return end in (None, position)

        rows = tiles([(domain.start, domain.room) for domain in self.domains], None)
        rows = rows and all(1 <= domain.items <= domain.room for domain in self.domains)
        users = tiles(
            [(shard.first_user, shard.users) for shard in self.shards], self.users
        )
        interactions = sum(shard.interactions for shard in self.shards)
        if not (
            self.domains
            and self.shards
            and rows
            and users
            and interactions == self.interactions
        ):
            raise InputError(
                f"{path}: domains, users or interactions do not add up: prepare the dataset again"
            )
        if not self.first_time <= self.last_time:
            raise InputError(
                f"{path}: times from {self.first_time} to {self.last_time}: prepare the dataset again"
            )
        if not (self.block_users >= 1 and 1 <= self.streams <= self.users):
            raise InputError(
                f"{path}: {self.block_users} users a block, {self.streams} streams for {self.users} users: "
                "prepare the dataset again"
            )
        if max(self.users, self.num_embeddings) > _INT32_MAX:
            raise InputError(
                f"{path}: more users or rows than int32 can number: prepare the dataset again"
            )
        for name in [part.vocabulary for part in self.domains] + [
            part.name for part in (*self.shards, *self.files)
        ]:
            if not stays_inside(name):
                raise InputError(
                    f"{path}: {name!r} is no name of a file in this folder: prepare the dataset again"
                )
        named = sorted(file.name for file in self.files)
        if named != sorted(
            [USERS, LENGTHS, *(domain.vocabulary for domain in self.domains)]
        ):
            raise InputError(
                f"{path}: the files it names are not those of a dataset: prepare the dataset again"
            )

    def _check_files(self, path, check_shards, check_contents):
        for file in self.files:
            self._check_size(file)
            if check_contents and File.of(self.folder, file.name) != file:
                raise InputError(
                    f"{self.folder / file.name}: its sha256 is not the one in {FILE_NAME}: copy it again or prepare the "
                    "dataset again"
                )
        if not any((self.folder / shard.name).is_file() for shard in self.shards):
            raise InputError(
                f"{path}: not one of its {len(self.shards)} shards is there: copy them again"
            )
        for shard in self.shards if check_shards else ():
            self._check_size(shard)

    def _check_size(self, named):
        file = self.folder / named.name
        if not file.is_file():
            raise InputError(
                f"{file} is missing: copy it again or prepare the dataset again"
            )
        if file.stat().st_size != named.bytes:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, {FILE_NAME} says {named.bytes}: copy it again "
                "or prepare the dataset again"
            )


def ticks_of(times, first, last) -> np.ndarray:
    """See `Dataset.ticks`."""
    span = max(last - first, np.finfo(np.float64).tiny)
    return (
        np.clip((np.asarray(times, np.float64) - first) / span, 0, 1) * TICKS
    ).astype(np.uint16)


def stays_inside(name) -> bool:
    """Whether a file's name leads out of no folder. Only by its words: that a file in the folder may be a link to elsewhere
    is the folder's owner's choice."""
    path = PurePosixPath(name)
    inside = path.name != "" and not path.is_absolute() and ".." not in path.parts
    return (
        inside and name.isprintable() and not set(name) & set("*?[]{}")
    )  # DuckDB would look for others


def _list(facts, name, path):
    if not isinstance(facts.get(name), list):
        raise InputError(
            f"{path}: the field {name!r} is missing or no list: prepare the dataset again"
        )
    return facts[name]


def _record(cls, facts, path, **own):
    """One dataclass from JSON, with every field but its `own` there and of its type. Unknown fields are refused too."""
    if not isinstance(facts, dict):
        raise InputError(
            f"{path}: a {cls.__name__} is written as {facts!r}: prepare the dataset again"
        )
    fields = {
        field.name: field.type
        for field in dataclasses.fields(cls)
        if field.name not in own
    }
    for name, kind in fields.items():
        if name not in facts:
            raise InputError(
                f"{path}: {cls.__name__} lacks the field {name!r}: prepare the dataset again"
            )
        kind = getattr(kind, "__origin__", kind)
        if not isinstance(facts[name], kind) or isinstance(facts[name], bool):
            raise InputError(
                f"{path}: {cls.__name__}.{name} is {facts[name]!r}: prepare the dataset again"
            )
    for name in facts:
        if name not in fields:
            raise InputError(
                f"{path}: {cls.__name__} has no field {name!r}: prepare the dataset again"
            )
    return cls(**facts, **own)
