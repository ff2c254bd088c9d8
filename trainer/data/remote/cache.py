"""The files of a dataset that lies elsewhere, as far as they are here: a folder of bounded size, which all processes of a host
share.

    <cache>/<fingerprint>/shards/000001.tar       what has come: whole, its sha256 compared
    <cache>/<fingerprint>/.fetch/000004.part      what is coming (the file's number, counted over `dataset.json`)
    <cache>/<fingerprint>/.fetch/000004.lock      locked by who fetches it; holds why that failed, a line each time
    <cache>/<fingerprint>/.fetch/000004.pin       locked, shared, by who is about to open it; who makes room leaves it alone
    <cache>/<fingerprint>/.fetch/room.lock        locked by who counts the bytes and makes room

Locks go with the process that holds them, so a killed one leaves nothing but a `.part`, which the next one goes on with.
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
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.data.remote.source import Address, NotFetched
from trainer.errors import InputError
from trainer.files.open_files import NoDescriptors, is_lack
from trainer.files.redact import words


class Cache:
    """The files of one dataset that lies elsewhere, as far as they are here."""

    def __init__(
        self, address: Address, fingerprint: str, shards: Iterable, files: Iterable
    ):
        """shards, files: name, bytes and sha256 of each, as in `dataset.json`; the files stay once they are here.

        Raises InputError: a name that is not plain, or comes twice; `cache_bytes` too few for the files and the largest shard.
        """
        shards, files = tuple(shards), tuple(files)
        self._given = address, fingerprint, shards, files
        self.address = address
        self.folder = _root(address.config) / fingerprint
        self._fetching = self.folder / ".fetch"
        self._files = {file.name: file for file in (*files, *shards)}
        self._number = {name: number for number, name in enumerate(self._files)}
        self._shards = frozenset(shard.name for shard in shards)
        self._checked = {}  # the inode of a file whose sha256 this process has seen to be right
        self._pins, self._ahead = threading.local(), None
        for name in self._files:
            if not _is_plain(name):
                raise InputError(
                    f"{address}: dataset.json names a file {name!r}; where a dataset is fetched, names are made of A-Z a-z 0-9 "
                    "_ . = + - and no part of them begins with . or -: prepare the dataset again"
                )
        if len(self._files) < len(files) + len(shards):
            raise InputError(
                f"{address}: dataset.json names a file twice: prepare the dataset again"
            )
        least = sum(file.bytes for file in files) + max(shard.bytes for shard in shards)
        if least > address.config.cache_bytes:
            raise InputError(
                f"stream.cache_bytes is {address.config.cache_bytes}: the largest shard of {address} and what is no shard "
                f"have {least} bytes: give at least these"
            )

    def __reduce__(self):
        return Cache, self._given

    def local(self, name: str) -> Path:
        """The path of a file, which is fetched where it is not here, or not as it should be.

        A shard stays at least until the same thread asks for its next one, and whoever has it open keeps it. Raises NotFetched;
        InputError: the cache cannot be written, a full disk.
        """
        with self._writing(name):
            if name in self._shards:
                self._pins.latest = None  # before there is room to be made
                self._pins.latest = _Lock(self._control(name, "pin"), fcntl.LOCK_SH)
            if not self._is_there(name):
                self._fetch(name)
            now = (
                time.time_ns()
            )  # the disk's own clock ticks too slowly to tell which of two came first
            os.utime(self.folder / name, ns=(now, now))
        return self.folder / name

    def ahead(self, names: Iterable[str]) -> None:
        """Begins to fetch the first `read_ahead` of these shards, in a thread of this process, in place of those named before.

        What fails is left to `local`, and so is what there is no room for.
        """
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = _Ahead(self._fetch_ahead)
        wanted = list(names)[: self.address.config.read_ahead]
        self._ahead.want([name for name in wanted if not (self.folder / name).exists()])

    def _fetch_ahead(self, name):
        with self._writing(name):
            self._fetch(name, needed=False)

    def _is_there(self, name):
        file = self._files[name]
        try:
            with open(self.folder / name, "rb") as stream:
                found = os.fstat(stream.fileno())
                if found.st_size != file.bytes or not stat.S_ISREG(found.st_mode):
                    return False
                if self._checked.get(name) != found.st_ino:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                        return False
                    self._checked[name] = found.st_ino
                return True
        except FileNotFoundError:
            return False

    def _fetch(self, name, needed=True):
        """needed: fetch it even where no room is left, since others are about to open what is there."""
        file, path, part = (
            self._files[name],
            self.folder / name,
            self._control(name, "part"),
        )
        lock = _Lock(self._control(name, "lock"))
        try:
            failed = (
                lock.take_and_read()
            )  # while this process waited: what it would meet, too
            if self._is_there(name):
                return
            if failed:
                raise NotFetched(failed)
            if not self._make_room(name, needed):
                return
            try:
                self.address.fetch(name, file.bytes, file.sha256, part)
            except NotFetched as error:
                lock.write(error.said)
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
            self._checked[name] = part.stat().st_ino
            part.replace(path)
        except (InputError, OSError):
            part.unlink(missing_ok=True)
            raise
        finally:
            lock.release()

    def _make_room(self, name, needed):
        """Reserves the bytes of a file by its `.part`, and removes what is left of killed processes and the shards read longest
        ago until it fits. False, and nothing reserved: it does not, and is not needed."""
        room = _Lock(self._fetching / "room.lock", fcntl.LOCK_EX)
        try:
            names, here, used = list(self._files), [], self._files[name].bytes
            for other in self._files:
                found = _stat(self.folder / other)
                if other != name and found is not None:
                    used += found.st_size
                    if other in self._shards:
                        here.append((found.st_mtime_ns, other, found.st_size))
            coming = [names[int(part.stem)] for part in self._fetching.glob("*.part")]
            coming = [other for other in coming if other != name]
            used += sum(self._files[other].bytes for other in coming)
            for other in coming:
                if used > self.address.config.cache_bytes and self._removed(
                    other, "lock", self._control(other, "part")
                ):
                    used -= self._files[other].bytes
            for _, other, size in sorted(here):
                if used > self.address.config.cache_bytes and self._removed(
                    other, "pin", self.folder / other
                ):
                    used -= size
            fits = used <= self.address.config.cache_bytes
            if fits or needed:
                self._control(name, "part").touch()
            return fits or needed
        finally:
            room.release()

    def _removed(self, name, kind, path):
        lock = _Lock(self._control(name, kind))
        try:
            free = lock.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
            if free:
                path.unlink(missing_ok=True)
            return free
        finally:
            lock.release()

    def _control(self, name, kind):
        return self._fetching / f"{self._number[name]:06d}.{kind}"

    @contextmanager
    def _writing(self, name):
        """What the other side does is a NotFetched; any OSError comes from this host's disk."""
        try:
            self._fetching.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if is_lack(error):
                raise NoDescriptors(self.folder / name, error) from None
            raise InputError(
                f"{self.folder / name} cannot be written ({words(error.strerror or error)}): make room on that disk, lower "
                "stream.cache_bytes, or give another folder as stream.cache",
                one_rank=True,
            ) from None


class _Ahead:
    """A thread that fetches what was last wanted, and ends when there is nothing left."""

    def __init__(self, fetch: Callable[[str], None]):
        self.process = os.getpid()
        self._fetch, self._wanted, self._runs, self._lock = (
            fetch,
            deque(),
            False,
            threading.Lock(),
        )

    def want(self, names):
        with self._lock:
            self._wanted = deque(names)
            if self._wanted and not self._runs:
                self._runs = True
                threading.Thread(
                    target=self._run, name="read-ahead", daemon=True
                ).start()

    def _run(self):
        while True:
            with self._lock:
                if not self._wanted:
                    self._runs = False
                    return
                name = self._wanted.popleft()
            with suppress(InputError):  # the reader meets it too, and says it
                self._fetch(name)


class _Lock:
    """A lock on a file, of the thread that takes it: until it is released, or nobody has it any more, or the process ends.

    A forked process has none of its parent's, or a killed parent's locks would live on in its workers.
    """

    def __init__(self, path, how=None):
        self._file = -1
        with _guard:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held.add(self)
        if how is not None:
            self.take(how)

    def take(self, how) -> bool:
        """Whether the lock was free; waits for it where `how` does not say otherwise."""
        try:
            fcntl.flock(self._file, how)
        except BlockingIOError:
            return False
        return True

    def take_and_read(self) -> str:
        """Takes the lock for this one alone; the line that others wrote last while it was waited for, else ""."""
        before = os.fstat(self._file).st_size
        self.take(fcntl.LOCK_EX)
        written = os.pread(self._file, 2**16, before).decode("utf-8", "replace")
        return written.splitlines()[-1] if written else ""

    def write(self, line):
        """Adds a line for those who wait."""
        os.pwrite(self._file, f"{line}\n".encode(), os.fstat(self._file).st_size)

    def release(self):
        """Waits for nothing: it may be called when the process ends, and threads that hold something go on no more."""
        file, self._file = self._file, -1
        if file >= 0:
            fcntl.flock(file, fcntl.LOCK_UN)  # whoever else has the file open by a fork
            os.close(file)

    __del__ = release

    def forget(self):
        """In a forked process: lets go of the parent's file, and leaves the parent its lock."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


_guard = (
    threading.RLock()
)  # no fork between the opening of a lock's file and its place in `_held`
_held = weakref.WeakSet()


def _in_the_child():
    global _guard
    _guard = threading.RLock()
    for lock in list(_held):
        lock.forget()


os.register_at_fork(
    before=lambda: _guard.acquire(),
    after_in_parent=lambda: _guard.release(),
    after_in_child=_in_the_child,
)


def _is_plain(name):
    """A name that means the same to a disk, a URL, a shell and a program's command line, and stays inside a folder."""
    return all(
        re.fullmatch(r"[A-Za-z0-9_=+][A-Za-z0-9_.=+-]*", part)
        for part in name.split("/")
    )


def _stat(path):
    try:
        return path.stat()
    except OSError:
        return None


def _root(config):
    try:
        if config.cache:
            return Path(config.cache).expanduser().absolute()
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (
            given if given.is_absolute() else Path.home() / ".cache"
        ) / "syncrec-trainer"
    except RuntimeError as error:  # a user without a home
        raise InputError(
            f"stream.cache is {config.cache!r}: {words(error)} Give a folder",
            one_rank=True,
        ) from None
