"""Remote datasets: how a file is fetched from an address, tried again, and known to be whole.

An address is http(s), a command (`pipe:`), or a scheme that WebDataset opens. A fetch that fails is
repeated with exponential backoff and jitter, and goes on with what has come. The files that have
come are kept by `cache.py`.
"""

import base64
import hashlib
import http.client
import importlib
import json
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from trainer.config.stream import SourceConfig
from trainer.errors import InputError
from trainer.files.redact import hide_user, printable_text, redact_location

_FILE_NAME = "{}"  # stands for the file's name in a command
_CHUNK = 2**18
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server says
_LARGEST_IN_MEMORY = 2**30
_LAST_WORDS = 300  # bytes of what a command writes to stderr
_AGAIN = (408, 429)  # the statuses of 4xx that pass by themselves
# Forked workers would share the state of any other.
_jitter = random.SystemRandom()

T = TypeVar("T")


class FetchFailed(InputError):
    """A file of a remote dataset could not be had, whatever was tried.

    problem: which file and why, without the way out.
    """

    def __init__(self, problem: str):
        super().__init__(
            f"{problem}: look after the address and what serves it, then run again",
            one_rank=True,
        )
        self.problem = problem


@dataclass(frozen=True)
class _Response:
    """What the other side sends.

    begin: which byte comes first, that asked for or 0. total: bytes of the whole file, where the
    other side tells. chunks: in them nothing but `_Failure` is raised for what it does.
    """

    begin: int
    total: int | None
    chunks: Iterator[bytes]


@dataclass(frozen=True, repr=False)
class Address:
    """An address of a dataset.

    It is `http(s)://…/folder`, `pipe:command with {}`, or a folder of another scheme that
    WebDataset opens. Raises InputError for any other.
    """

    text: str
    config: SourceConfig

    def __post_init__(self):
        scheme = self.text.partition(":")[0]
        if scheme == "pipe":
            self._refuse_nameless_command()
        elif self._is_http:
            self._refuse_invalid_url(scheme)
        else:
            self._refuse_unknown_scheme(scheme)

    def _refuse_nameless_command(self) -> None:
        if _FILE_NAME not in self.text:
            raise InputError(
                f"{self}: the command has no {_FILE_NAME} for the file's name, as in "
                f"pipe:cat /folder/{_FILE_NAME}"
            )

    def _refuse_unknown_scheme(self, scheme: str) -> None:
        schemes = _import_webdataset().gopen_schemes
        if scheme not in schemes:
            names = set(schemes) - {"__default__"}
            known = ", ".join(sorted(names))
            raise InputError(
                f"{self}: {scheme} is no scheme that can be opened here ({known}): "
                "give a command that writes the file, as in "
                f"pipe:aws s3 cp s3://bucket/folder/{_FILE_NAME} -"
            )

    def _refuse_invalid_url(self, scheme: str) -> None:
        try:
            parts = urlsplit(self.text)
            # Reading the port raises ValueError for one that is no number up to 65,535.
            has_valid_port = parts.port is None or parts.port >= 0
            valid = bool(parts.hostname) and has_valid_port
        except ValueError:
            valid = False
        if not valid:
            # Nothing of it is said: which part of it is the password cannot be told either.
            raise InputError(
                f"{scheme}://…: this is no valid address; quote what is special in user and "
                "password by %XX"
            )

    def __str__(self):
        return redact_location(self.text)

    def shown(self, name: str) -> str:
        """The address of a file as it may be printed."""
        return redact_location(self._address_of(name))

    def read_json(self, name: str) -> Any:
        """The contents of a file whose size and checksum nobody knows. Raises FetchFailed."""
        return self._retry(name, lambda: self._read_json_once(name))

    def _read_json_once(self, name: str) -> Any:
        data = bytearray()
        with self._open(name, 0) as response:
            for chunk in response.chunks:
                data += chunk
                if len(data) > _LARGEST_IN_MEMORY:
                    raise _Failure(
                        f"it has more than {_LARGEST_IN_MEMORY} bytes",
                        final=True,
                    )
        if response.total not in (None, len(data)):
            raise _Failure(f"{len(data)} of its {response.total} bytes came")
        try:
            text = data.decode("utf-8")
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = printable_text(error)
            raise _Failure(f"what came is no JSON ({reason})") from None

    def fetch(
        self,
        name: str,
        size: int,
        sha256: str,
        part: Path,
    ) -> None:
        """Puts a file of known size and sha256 into `part`, and goes on with what it holds.

        Raises FetchFailed; OSError: `part` cannot be written.
        """
        self._retry(name, lambda: self._fetch_once(name, size, sha256, part))

    def _fetch_once(
        self,
        name: str,
        size: int,
        sha256: str,
        part: Path,
    ) -> None:
        with open(part, "r+b") as file:
            download = _Download(file, size, sha256)
            if download.is_whole():  # killed before it could be renamed
                return
            if download.came >= size:
                download.reset()
            try:
                with self._open(name, download.came) as response:
                    download.write(response)
                download.refuse_if_damaged()
            except _Failure as failure:
                if failure.anew:
                    download.reset()
                raise
            file.flush()
            os.fsync(file.fileno())

    def _retry(self, name: str, attempt: Callable[[], T]) -> T:
        number = 0
        while True:
            number += 1
            try:
                return attempt()
            except _Failure as failure:
                if failure.final or number >= self.config.attempts:
                    reason = self._hide_secrets(str(failure))
                    attempts = ""
                    if number > 1:
                        attempts = (
                            f" ({number} attempts, this came of the last)"
                        )
                    address = self.shown(name)
                    raise FetchFailed(
                        f"{address} cannot be fetched: {reason}{attempts}"
                    ) from None
                wait = self.config.retry_seconds * 2 ** (number - 1)
                wait *= _jitter.uniform(0.5, 1.5)
                wait = max(wait, failure.wait)
                time.sleep(min(wait, _LONGEST_WAIT))

    @property
    def _is_http(self) -> bool:
        return self.text.startswith(("http://", "https://"))

    def _address_of(self, name: str) -> str:
        """The address of a file, here shards/0.tar.

        http://host/data?key=1    http://host/data/shards/0.tar?key=1
        pipe:cat /data/{}         pipe:cat /data/shards/0.tar
        gs://bucket/data/         gs://bucket/data/shards/0.tar
        """
        if self.text.startswith("pipe:"):
            return self.text.replace(_FILE_NAME, shlex.quote(name))
        if not self._is_http:
            return f"{self.text.rstrip('/')}/{name}"
        parts = urlsplit(self.text)
        path = f"{parts.path.rstrip('/')}/{name}"
        path = quote(path, safe="/%:@!$&'()*+,;=~")
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def _hide_secrets(self, text: str) -> str:
        if self._is_http:
            parts = urlsplit(self.text)
            for secret in (parts.password, parts.query):
                if secret:
                    text = text.replace(secret, "…")
        return hide_user(text)

    def _open(self, name: str, begin: int) -> AbstractContextManager[_Response]:
        """Opens a file from a byte on, or from its first one.

        Raises nothing but `_Failure` for what the other side does.
        """
        address = self._address_of(name)
        if self._is_http:
            return _open_http(address, begin, self.config.timeout_seconds)
        return _open_with_webdataset(address, self.config.timeout_seconds)


class _Download:
    """A file that is coming, with the sha256 of what has come."""

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        sha256: str,
    ):
        """Reads what `file` holds. size, sha256: of the whole file."""
        self._file = file
        self._size = size
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            self._digest.update(chunk)
        self.came = file.tell()

    def reset(self) -> None:
        """Drops what has come."""
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.came = 0

    def is_whole(self) -> bool:
        if self.came != self._size:
            return False
        return self._digest.hexdigest() == self._sha256

    def write(self, response: _Response) -> None:
        """Adds what comes. Raises _Failure where it is not a part of this file."""
        if response.total not in (None, self._size):
            # A page that tells of an error, rather than a part of the file.
            raise _Failure(
                f"{response.total} bytes are there, dataset.json says {self._size}",
                anew=True,
            )
        if response.begin != self.came:
            self.reset()
        for chunk in response.chunks:
            self.came += len(chunk)
            if self.came > self._size:
                raise _Failure(
                    f"more than its {self._size} bytes came", anew=True
                )
            self._file.write(chunk)
            self._digest.update(chunk)

    def refuse_if_damaged(self) -> None:
        """Raises _Failure where the file is not whole."""
        if self.came != self._size:
            raise _Failure(f"{self.came} of its {self._size} bytes came")
        if self._digest.hexdigest() != self._sha256:
            raise _Failure(
                "its sha256 is not the one in dataset.json", anew=True
            )


@contextmanager
def _open_http(
    address: str,
    begin: int,
    timeout: float,
) -> Iterator[_Response]:
    request = _make_request(address, begin)
    with _turning_into_failures():
        response = _make_http_opener().open(request, timeout=timeout)
    with response:
        first = 0
        if response.status == 206:
            first = _first_byte_of(response)
            if first not in (0, begin):
                raise _Failure(
                    f"the server sent the bytes from {first} on, asked for those from "
                    f"{begin} on",
                    anew=True,
                )
        elif response.status != 200:
            reason = printable_text(response.reason)
            raise _Failure(f"HTTP {response.status} {reason}")
        total = None
        if response.length is not None:
            total = first + response.length
        yield _Response(first, total, _read_http_chunks(response))


def _make_request(address: str, begin: int) -> urllib.request.Request:
    """A request for the bytes from `begin` on, with the user of the address in a header."""
    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme, host, *parts[2:]))
    request = urllib.request.Request(
        url, headers={"User-Agent": "syncrec-trainer"}
    )
    if user:  # not sent on to where the server may point
        if ":" not in user:
            user = f"{user}:"
        plain = unquote(user)
        encoded = base64.b64encode(plain.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    return request


def _first_byte_of(response: http.client.HTTPResponse) -> int:
    """Which byte the server says that its answer begins with; −1 where it does not say."""
    content_range = response.headers.get("Content-Range", "")
    match = re.match(r"bytes (\d+)-", content_range)
    if match is None:
        return -1
    return int(match[1])


def _read_http_chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        with _turning_into_failures():
            chunk = response.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _open_with_webdataset(address: str, timeout: float) -> Iterator[_Response]:
    """Opens a command, or another scheme that WebDataset knows, which may be a command too."""
    gopen = _import_webdataset()
    address = gopen.rewrite_url(address)
    is_pipe = address.startswith("pipe:")
    with tempfile.TemporaryFile() as stderr:
        with _turning_into_failures():
            if is_pipe:
                stream = gopen.Pipe(
                    address.removeprefix("pipe:"),
                    mode="rb",
                    shell=True,
                    bufsize=0,
                    stdin=subprocess.DEVNULL,
                    stderr=stderr,
                    # A session of its own: whatever the command starts ends with it.
                    start_new_session=True,
                )
            else:
                stream = gopen.gopen(address, "rb", bufsize=0)
        process = getattr(stream, "proc", None)
        output = stream
        if process:
            output = stream.stream
        try:
            chunks = _read_command_chunks(output, process, stderr, timeout)
            yield _Response(0, None, chunks)
        finally:
            # Where it is not waited for yet, its number is still its own.
            if process and process.returncode is None:
                if is_pipe:
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()
            output.close()


def _read_command_chunks(
    output: BinaryIO,
    process: subprocess.Popen | None,
    stderr: BinaryIO,
    timeout: float,
) -> Iterator[bytes]:
    """What a command writes until it ends. Raises _Failure where it ends with an error."""
    descriptor = output.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(timeout * 1000):
            raise _Failure(f"no byte came for {timeout:g} s")
        chunk = os.read(descriptor, _CHUNK)
        if not chunk:
            break
        yield chunk
    if not process:
        return
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise _Failure(
            f"the command did not end within {timeout:g} s of its last byte"
        ) from None
    if status:
        last_words = _read_last_words(stderr)
        raise _Failure(f"the command ended with status {status}{last_words}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to http and https alone, and from https to https."""

    def redirect_request(
        self,
        request,
        file,
        code,
        message,
        headers,
        newurl,
    ):
        scheme = urlsplit(newurl).scheme
        loses_https = request.type == "https" and scheme == "http"
        if scheme not in ("http", "https") or loses_https:
            raise _Failure(
                f"it redirects from {request.type} to {printable_text(scheme)}",
                final=True,
            )
        return super().redirect_request(
            request, file, code, message, headers, newurl
        )


def _make_http_opener() -> urllib.request.OpenerDirector:
    """Opens http and https, and neither files nor ftp, to which urllib's own would follow."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


class _Failure(Exception):
    """An attempt has failed.

    final: the next one would fail alike. wait: seconds that the server asks for. anew: what has
    come so far is of no use.
    """

    def __init__(
        self,
        reason: str,
        final: bool = False,
        wait: float = 0.0,
        anew: bool = False,
    ):
        super().__init__(reason)
        self.final = final
        self.wait = wait
        self.anew = anew


@contextmanager
def _turning_into_failures() -> Iterator[None]:
    """Turns whatever the other side does into a `_Failure`."""
    try:
        yield
    except _Failure:
        raise
    except urllib.error.HTTPError as error:
        with error:
            raise _failure_of_status(error) from None
    except TimeoutError:
        raise _Failure("nothing came for too long") from None
    except urllib.error.URLError as error:
        raise _Failure(printable_text(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise _Failure(printable_text(error), final=is_missing) from None
    except Exception as error:
        # What a scheme of WebDataset's needs is not installed, or its address is no address.
        raise _Failure(printable_text(error), final=True) from None


def _failure_of_status(error: urllib.error.HTTPError) -> _Failure:
    after = error.headers.get("Retry-After", "")
    wait = 0.0
    if re.fullmatch(r"\d{1,9}", after, re.ASCII):
        wait = float(after)
    beyond_end = error.code == 416  # less lies there than has come
    passes = error.code in _AGAIN or beyond_end
    final = 400 <= error.code < 500 and not passes
    reason = f"HTTP {error.code} {printable_text(error.reason)}"
    return _Failure(reason, final, wait, anew=beyond_end)


def _import_webdataset() -> ModuleType:
    """WebDataset's way to open things.

    It is not imported before it is needed, since it takes torch along, for seconds.
    """
    return importlib.import_module("webdataset.gopen")


def _read_last_words(file: BinaryIO) -> str:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _LAST_WORDS))
    written = file.read().decode("utf-8", "replace").strip()
    if not written:
        return ""
    return f" and said {printable_text(written)!r}"
