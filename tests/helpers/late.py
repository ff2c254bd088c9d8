"""A shared storage that shows one rank what others wrote only after a while, as NFS does: for
Python's own file operations."""

import builtins
import contextlib
import errno
import fnmatch
import io
import os
import time
from pathlib import Path
from unittest import mock


class Late:
    """Paths that match `pattern` (of fnmatch) are not seen as they are until `seconds` after the
    first look at one of them.

    how: "unlisted", not in listings; "absent", ENOENT besides; "short", the attributes of an empty
    file; "stale", ESTALE."""

    def __init__(self, pattern, seconds, how="absent"):
        self.pattern, self.seconds, self.how = pattern, seconds, how
        self.looks, self._first = 0, None

    def hides(self, path):
        """Whether the path is one of them, and it is too early."""
        if not isinstance(path, str | os.PathLike) or not fnmatch.fnmatch(
            os.fspath(path), self.pattern
        ):
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        if now - self._first >= self.seconds:
            return False
        self.looks += 1
        return True

    @contextlib.contextmanager
    def seen(self):
        """Within it this process sees files so."""
        with contextlib.ExitStack() as stack:
            by_name = self.how != "unlisted"
            for module, name in (
                ((os, "stat"), (os, "lstat")) if by_name else ()
            ):
                stack.enter_context(
                    mock.patch.object(
                        module, name, self._asked(getattr(module, name))
                    )
                )
            for module, name in (
                ((builtins, "open"), (io, "open"), (os, "open"))
                if by_name
                else ()
            ):
                stack.enter_context(
                    mock.patch.object(
                        module, name, self._opened(getattr(module, name))
                    )
                )
            listdir, scandir = os.listdir, os.scandir
            stack.enter_context(
                mock.patch.object(
                    os,
                    "listdir",
                    lambda path=".": self._listed(path, listdir(path)),
                )
            )
            stack.enter_context(
                mock.patch.object(
                    os,
                    "scandir",
                    lambda path=".": _Entries(self, path, scandir(path)),
                )
            )
            yield self

    def _listed(self, folder, names):
        return [
            name
            for name in names
            if not (self.lists_late and self.hides(os.path.join(folder, name)))
        ]

    @property
    def lists_late(self):
        """Whether listings lack what is hidden."""
        return self.how in ("unlisted", "absent")

    def _refuse(self, path):
        number = {"absent": errno.ENOENT, "stale": errno.ESTALE}[self.how]
        raise OSError(number, os.strerror(number), os.fspath(path))

    def _asked(self, real):
        def asked(path, **options):
            found = real(path, **options)
            if "dir_fd" in options or not self.hides(path):
                return found
            if self.how == "short":
                values = list(found)
                values[6] = 0
                return os.stat_result(values)
            return self._refuse(path)

        return asked

    def _opened(self, real):
        def opened(path, mode="r", *others, **options):
            reads = (
                not (isinstance(mode, int) and mode & (os.O_WRONLY | os.O_RDWR))
                and str(mode)[:1] not in "wax"
            )
            if (
                reads
                and self.how != "short"
                and "dir_fd" not in options
                and self.hides(path)
            ):
                self._refuse(path)
            return real(path, mode, *others, **options)

        return opened


class _Entries:
    """What os.scandir gives, without those that are hidden."""

    def __init__(self, late, folder, entries):
        self._late, self._entries = late, entries
        self._folder = folder if isinstance(folder, str | os.PathLike) else ""

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            entry = next(self._entries)
            if not (
                self._late.lists_late
                and self._late.hides(Path(self._folder) / entry.name)
            ):
                return entry

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._entries.close()

    def close(self):
        self._entries.close()
