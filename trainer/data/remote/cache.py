"""The local cache of a dataset that lies elsewhere: a folder of bounded size, shared by a host.

    <cache>/<fingerprint>/shards/000001.tar     what has come: whole, its sha256 compared
    <cache>/<fingerprint>/.fetch/000004.part    what is coming (the file's number in dataset.json)
    <cache>/<fingerprint>/.fetch/000004.lock    locked by who fetches it; lines say why that failed
    <cache>/<fingerprint>/.fetch/000004.pin     locked, shared, by who opens it soon: not evicted
    <cache>/<fingerprint>/.fetch/room.lock      locked by who counts the bytes and makes room

Shards that were read longest ago are evicted first (LRU). Locks go with the process that holds
them, so a killed one leaves nothing but a `.part`, which the next one goes on with.
"""

import fcntl
import hashlib
import os
import re
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from trainer.config.stream import SourceConfig
from trainer.data.remote.source import Address, FetchFailed
from trainer.errors import InputError
from trainer.files.open_files import TooManyOpenFiles, is_too_many_open_files
from trainer.files.redact import printable_text

_LONGEST_LINE = 2**16  # that a lock's file is read for, in bytes
_PLAIN_PART = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9_.=+-]*")


class RemoteFile(Protocol):
    """What `dataset.json` says of a file."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...


class Cache:
    """The files of one dataset that lies elsewhere, as far as they have come."""

    def __init__(
        self,
        address: Address,
        fingerprint: str,
        shards: Iterable[RemoteFile],
        files: Iterable[RemoteFile],
    ):
        """shards, files: as in `dataset.json`; the files stay once they have come.

        Raises InputError: a name that is not plain, or comes twice; `cache_bytes` too few for the
        files and the largest shard.
        """
        shards = tuple(shards)
        files = tuple(files)
        self._arguments = (address, fingerprint, shards, files)
        self.address = address
        self.folder = _cache_root(address.config) / fingerprint
        self._fetching = self.folder / ".fetch"
        self._files = {file.name: file for file in (*files, *shards)}
        self._names = list(self._files)
        self._number = {name: number for number, name in enumerate(self._names)}
        self._shards = frozenset(shard.name for shard in shards)
        # Inodes whose sha256 this process found right, by name.
        self._checked: dict[str, int] = {}
        self._pins = threading.local()
        self._read_ahead: _ReadAhead | None = None
        self._refuse_names(len(files) + len(shards))
        self._refuse_small_cache(shards, files)

    def __reduce__(self):
        return Cache, self._arguments

    def _refuse_names(self, files: int) -> None:
        for name in self._names:
            if not _is_plain(name):
                raise InputError(
                    f"{self.address}: dataset.json names a file {name!r}; where a dataset is "
                    "fetched, names are made of A-Z a-z 0-9 _ . = + - and no part of them "
                    "begins with . or -: prepare the dataset again"
                )
        if len(self._names) < files:
            raise InputError(
                f"{self.address}: dataset.json names a file twice: prepare the dataset again"
            )

    def _refuse_small_cache(
        self, shards: tuple[RemoteFile, ...], files: tuple[RemoteFile, ...]
    ) -> None:
        least = max(shard.bytes for shard in shards)
        for file in files:
            least += file.bytes
        room = self.address.config.cache_bytes
        if least > room:
            raise InputError(
                f"stream.cache_bytes is {room}: the largest shard of {self.address} and "
                f"what is no shard have {least} bytes: give at least these"
            )

    def local(self, name: str) -> Path:
        """The local path of a file, which is fetched where it is missing or damaged.

        A shard stays at least until the same thread asks for its next one, and whoever has it open
        keeps it. Raises FetchFailed; InputError: the cache cannot be written, a full disk.
        """
        path = self.folder / name
        with self._blaming_this_disk(name):
            if name in self._shards:
                self._pins.latest = None  # before there is room to be made
                pin = self._control(name, "pin")
                self._pins.latest = _Lock(pin, fcntl.LOCK_SH)
            if not self._is_whole(name):
                self._fetch(name)
            # The disk's own clock ticks too slowly to tell which of two came first.
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        return path

    def ahead(self, names: Iterable[str]) -> None:
        """Prefetches the first `read_ahead` of these shards, in a thread of this process.

        They take the place of those named before. What fails is left to `local`, and so is what
        there is no room for.
        """
        if self._read_ahead is None or self._read_ahead.process != os.getpid():
            self._read_ahead = _ReadAhead(self._fetch_ahead)
        most = self.address.config.read_ahead
        wanted = list(names)[:most]
        missing = [name for name in wanted if not (self.folder / name).exists()]
        self._read_ahead.request(missing)

    def _fetch_ahead(self, name: str) -> None:
        with self._blaming_this_disk(name):
            self._fetch(name, needed=False)

    def _is_whole(self, name: str) -> bool:
        """Whether a file has come, and has the sha256 of `dataset.json`."""
        file = self._files[name]
        try:
            with open(self.folder / name, "rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_size != file.bytes:
                    return False
                if not stat.S_ISREG(status.st_mode):
                    return False
                if self._checked.get(name) == status.st_ino:
                    return True
                digest = hashlib.file_digest(stream, "sha256")
                if digest.hexdigest() != file.sha256:
                    return False
                self._checked[name] = status.st_ino
                return True
        except FileNotFoundError:
            return False

    def _fetch(self, name: str, needed: bool = True) -> None:
        """needed: even where no room is left, since others are about to open what is there."""
        file = self._files[name]
        path = self.folder / name
        part = self._control(name, "part")
        lock = _Lock(self._control(name, "lock"))
        try:
            # Others failed while this process waited: it would meet the same.
            failure = lock.take_and_read()
            if self._is_whole(name):
                return
            if failure:
                raise FetchFailed(failure)
            if not self._make_room(name, needed):
                return
            try:
                self.address.fetch(name, file.bytes, file.sha256, part)
            except FetchFailed as error:
                lock.write(error.problem)
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
            self._checked[name] = part.stat().st_ino
            part.replace(path)
        except (InputError, OSError):
            part.unlink(missing_ok=True)
            raise
        finally:
            lock.release()

    def _make_room(self, name: str, needed: bool) -> bool:
        """Reserves the bytes of a file by its `.part`, and evicts others until it fits.

        What goes is what killed processes left, then the shards that were read longest ago. False:
        the file does not fit and is not needed, so that nothing is reserved.

        An example, at most 100 bytes, for a file of 40:

            has come    a (30 bytes, read first), b (30), c (20)
            coming      d (10), its process was killed
            evicted     d, a: 40 + 30 + 20 bytes are left
        """
        limit = self.address.config.cache_bytes
        room = _Lock(self._fetching / "room.lock", fcntl.LOCK_EX)
        try:
            used = self._files[name].bytes
            shards = []  # that have come: (time, name, bytes)
            for other in self._names:
                status = _stat(self.folder / other)
                if other == name or status is None:
                    continue
                used += status.st_size
                if other in self._shards:
                    shard = (status.st_mtime_ns, other, status.st_size)
                    shards.append(shard)
            coming = self._list_coming(name)
            for other in coming:
                used += self._files[other].bytes
            for other in coming:
                part = self._control(other, "part")
                if used > limit and self._remove_unlocked(other, "lock", part):
                    used -= self._files[other].bytes
            for _, other, size in sorted(shards):
                path = self.folder / other
                if used > limit and self._remove_unlocked(other, "pin", path):
                    used -= size
            reserves = needed or used <= limit
            if reserves:
                self._control(name, "part").touch()
            return reserves
        finally:
            room.release()

    def _list_coming(self, name: str) -> list[str]:
        """The files that are being fetched, or were by a killed process, but for this one."""
        coming = []
        for part in self._fetching.glob("*.part"):
            other = self._names[int(part.stem)]
            if other != name:
                coming.append(other)
        return coming

    def _remove_unlocked(
        self,
        name: str,
        kind: str,
        path: Path,
    ) -> bool:
        """Removes a path unless somebody holds the file's lock of that kind."""
        lock = _Lock(self._control(name, kind))
        try:
            free = lock.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
            if free:
                path.unlink(missing_ok=True)
            return free
        finally:
            lock.release()

    def _control(self, name: str, kind: str) -> Path:
        """The file by which processes agree on the third file: .fetch/000002.lock, .pin, .part."""
        return self._fetching / f"{self._number[name]:06d}.{kind}"

    @contextmanager
    def _blaming_this_disk(self, name: str) -> Iterator[None]:
        """Turns any OSError into an InputError that names this host's disk.

        What the other side does is a FetchFailed already.
        """
        path = self.folder / name
        try:
            self._fetching.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if is_too_many_open_files(error):
                raise TooManyOpenFiles(path, error) from None
            reason = printable_text(error.strerror or error)
            raise InputError(
                f"{path} cannot be written ({reason}): make room on that disk, lower "
                "stream.cache_bytes, or give another folder as stream.cache",
                one_rank=True,
            ) from None


class _ReadAhead:
    """A thread that fetches what was requested last, and ends when there is nothing left."""

    def __init__(self, fetch: Callable[[str], None]):
        self.process = os.getpid()
        self._fetch = fetch
        self._requested: deque[str] = deque()
        self._runs = False
        self._lock = threading.Lock()

    def request(self, names: list[str]) -> None:
        with self._lock:
            self._requested = deque(names)
            if self._requested and not self._runs:
                self._runs = True
                thread = threading.Thread(
                    target=self._run,
                    name="read-ahead",
                    daemon=True,
                )
                thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._requested:
                    self._runs = False
                    return
                name = self._requested.popleft()
            with suppress(InputError):  # the reader meets it too, and says it
                self._fetch(name)


class _Lock:
    """A lock on a file, of the thread that takes it.

    It ends when it is released, when nobody has the object any more, or with the process. A forked
    process has none of its parent's, or a killed parent's locks would live on in its workers.
    """

    def __init__(self, path: Path, how: int | None = None):
        """how: flags of `fcntl.flock`, where the lock is taken at once."""
        self._file = -1
        with _fork_guard:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666)
            _live_locks.add(self)
        if how is not None:
            self.take(how)

    def take(self, how: int) -> bool:
        """Whether the lock was free; waits for it where `how` does not say otherwise."""
        try:
            fcntl.flock(self._file, how)
        except BlockingIOError:
            return False
        return True

    def take_and_read(self) -> str:
        """Takes the lock for this one alone.

        Returns the line that others wrote last while it was waited for, else "".
        """
        before = os.fstat(self._file).st_size
        self.take(fcntl.LOCK_EX)
        written = os.pread(self._file, _LONGEST_LINE, before)
        lines = written.decode("utf-8", "replace").splitlines()
        if not lines:
            return ""
        return lines[-1]

    def write(self, line: str) -> None:
        """Adds a line for those who wait."""
        end = os.fstat(self._file).st_size
        os.pwrite(self._file, f"{line}\n".encode(), end)

    def release(self) -> None:
        """Releases the lock, and waits for nothing.

        It may be called when the process ends, and threads that hold something go on no more.
        """
        file = self._file
        self._file = -1
        if file >= 0:
            # Whoever else has the file open by a fork.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    __del__ = release

    def forget(self) -> None:
        """In a forked process: lets go of the parent's file, and leaves the parent its lock."""
        file = self._file
        self._file = -1
        if file >= 0:
            os.close(file)


# No fork between the opening of a lock's file and its entry in `_live_locks`.
_fork_guard = threading.RLock()
_live_locks: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _forget_in_child() -> None:
    global _fork_guard
    _fork_guard = threading.RLock()
    for lock in list(_live_locks):
        lock.forget()


os.register_at_fork(
    before=lambda: _fork_guard.acquire(),
    after_in_parent=lambda: _fork_guard.release(),
    after_in_child=_forget_in_child,
)


def _is_plain(name: str) -> bool:
    """A name that means the same to a disk, a URL, a shell and a program's command line.

    It also stays inside a folder.
    """
    parts = name.split("/")
    return all(_PLAIN_PART.fullmatch(part) for part in parts)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _cache_root(config: SourceConfig) -> Path:
    try:
        if config.cache:
            return Path(config.cache).expanduser().absolute()
        cache_home = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(cache_home)
        if not root.is_absolute():
            root = Path.home() / ".cache"
        return root / "syncrec-trainer"
    except RuntimeError as error:  # a user without a home
        raise InputError(
            f"stream.cache is {config.cache!r}: {printable_text(error)} Give a folder",
            one_rank=True,
        ) from None
