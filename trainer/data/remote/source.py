"""Datasets that lie elsewhere: how a file is had from an address, tried again, and known to be whole.

The files that have come are kept by `cache.py`.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from trainer.config.stream import SourceConfig
from trainer.errors import InputError
from trainer.files.redact import _without_user, shown, words

_PLACE = "{}"  # where the file's name stands in a command
_CHUNK = 2**18
_LONGEST_WAIT = (
    60.0  # seconds between two attempts, whatever the doubling or the server says
)
_LARGEST_IN_MEMORY = 2**30
_AGAIN = (408, 429)  # the statuses of 4xx that pass by themselves
_jitter = random.SystemRandom()  # forked workers would share the state of any other


class NotFetched(InputError):
    """A file of a dataset that lies elsewhere could not be had, whatever was tried. `said`: which and why, no way out."""

    def __init__(self, said):
        super().__init__(
            f"{said}: look after the address and what serves it, then run again",
            one_rank=True,
        )
        self.said = said


@dataclass(frozen=True, repr=False)
class Address:
    """An address of a dataset: `http(s)://…/folder`, `pipe:command with {}`, or a folder of another scheme that WebDataset
    opens. Raises InputError for any other."""

    text: str
    config: SourceConfig

    def __post_init__(self):
        scheme = self.text.partition(":")[0]
        if scheme == "pipe":
            if _PLACE not in self.text:
                raise InputError(
                    f"{self}: the command has no {_PLACE} for the file's name, as in pipe:cat /folder/{_PLACE}"
                )
        elif not self._is_http and scheme not in (
            gopen_schemes := _webdataset().gopen_schemes
        ):
            known = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
            raise InputError(
                f"{self}: {scheme} is no scheme that can be opened here ({known}): give a command that writes the file, as in "
                f"pipe:aws s3 cp s3://bucket/folder/{_PLACE} -"
            )
        elif self._is_http:
            try:
                parts = urlsplit(self.text)
                valid = bool(parts.hostname) and (parts.port is None or parts.port >= 0)
            except ValueError:
                valid = False
            if not valid:  # nothing of it is said: what is the password in it cannot be told either
                raise InputError(
                    f"{scheme}://…: this is no valid address; quote what is special in user and password by %XX"
                )

    def __str__(self):
        return shown(self.text)

    def shown(self, name) -> str:
        """The address of a file as it may be printed."""
        return shown(self._full(name))

    def read_json(self, name):
        """The contents of a file whose size and checksum nobody knows. Raises NotFetched."""

        def attempt():
            data = bytearray()
            with self._opened(name, 0) as (_, total, chunks):
                for chunk in chunks:
                    data += chunk
                    if len(data) > _LARGEST_IN_MEMORY:
                        raise _Failure(
                            f"it has more than {_LARGEST_IN_MEMORY} bytes", final=True
                        )
            if total not in (None, len(data)):
                raise _Failure(f"{len(data)} of its {total} bytes came")
            try:
                return json.loads(data.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise _Failure(f"what came is no JSON ({words(error)})") from None

        return self._tried(name, attempt)

    def fetch(self, name, size, sha256, part: Path) -> None:
        """Puts a file of known size and sha256 into `part`, going on with what it holds. Raises NotFetched; OSError: `part`
        cannot be written."""

        def attempt():
            with open(part, "r+b") as file:
                start, digest = _so_far(file)
                if (
                    start == size and digest.hexdigest() == sha256
                ):  # killed before it could be renamed
                    return
                if start >= size:
                    start, digest = _anew(file)
                try:
                    with self._opened(name, start) as (begin, total, chunks):
                        if total not in (
                            None,
                            size,
                        ):  # a page that says so, rather than a part of the file
                            raise _Failure(
                                f"{total} bytes are there, dataset.json says {size}",
                                anew=True,
                            )
                        if begin != start:
                            start, digest = _anew(file)
                        for chunk in chunks:
                            start += len(chunk)
                            if start > size:
                                raise _Failure(
                                    f"more than its {size} bytes came", anew=True
                                )
                            file.write(chunk)
                            digest.update(chunk)
                    if start != size:
                        raise _Failure(f"{start} of its {size} bytes came")
                    if digest.hexdigest() != sha256:
                        raise _Failure(
                            "its sha256 is not the one in dataset.json", anew=True
                        )
                except _Failure as failure:
                    if failure.anew:
                        _anew(file)
                    raise
                file.flush()
                os.fsync(file.fileno())

        self._tried(name, attempt)

    def _tried(self, name, attempt):
        for number in range(1, self.config.attempts + 1):
            try:
                return attempt()
            except _Failure as failure:
                reason = self._without_secrets(str(failure))
                if failure.final or number == self.config.attempts:
                    tried = (
                        f" ({number} attempts, this came of the last)"
                        if number > 1
                        else ""
                    )
                    raise NotFetched(
                        f"{self.shown(name)} cannot be fetched: {reason}{tried}"
                    ) from None
                wait = max(
                    self.config.retry_seconds
                    * 2 ** (number - 1)
                    * _jitter.uniform(0.5, 1.5),
                    failure.wait,
                )
                time.sleep(min(wait, _LONGEST_WAIT))

    @property
    def _is_http(self):
        return self.text.startswith(("http://", "https://"))

    def _full(self, name):
        if self.text.startswith("pipe:"):
            return self.text.replace(_PLACE, shlex.quote(name))
        if not self._is_http:
            return f"{self.text.rstrip('/')}/{name}"
        parts = urlsplit(self.text)
        path = quote(f"{parts.path.rstrip('/')}/{name}", safe="/%:@!$&'()*+,;=~")
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def _without_secrets(self, text):
        parts = urlsplit(self.text) if self._is_http else None
        for secret in (parts.password, parts.query) if parts else ():
            text = text.replace(secret, "…") if secret else text
        return _without_user(text)

    def _opened(self, name, start):
        """A context: (which byte comes first: `start` or 0, how many there are in all or None, an iterator of chunks).

        In it nothing but `_Failure` is raised for what the other side does.
        """
        return self._http(name, start) if self._is_http else self._piped(name)

    @contextmanager
    def _http(self, name, start):
        parts = urlsplit(self._full(name))
        user, _, host = parts.netloc.rpartition("@")
        url = urlunsplit((parts.scheme, host, *parts[2:]))
        request = urllib.request.Request(url, headers={"User-Agent": "syncrec-trainer"})
        if user:  # not sent on to where the server may point
            basic = base64.b64encode(
                unquote(user if ":" in user else f"{user}:").encode()
            ).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        with _failing():
            response = _http_alone().open(request, timeout=self.config.timeout_seconds)
        with response:
            begin = 0
            if response.status == 206:
                found = re.match(
                    r"bytes (\d+)-", response.headers.get("Content-Range", "")
                )
                begin = int(found[1]) if found else -1
                if begin not in (0, start):
                    raise _Failure(
                        f"the server sent the bytes from {begin} on, asked for those from {start} on",
                        anew=True,
                    )
            elif response.status != 200:
                raise _Failure(f"HTTP {response.status} {words(response.reason)}")
            total = None if response.length is None else begin + response.length

            def chunks():
                while True:
                    with _failing():
                        chunk = response.read(_CHUNK)
                    if not chunk:
                        return
                    yield chunk

            yield begin, total, chunks()

    @contextmanager
    def _piped(self, name):
        opens, timeout = _webdataset(), self.config.timeout_seconds
        address = opens.rewrite_url(self._full(name))
        own = address.startswith(
            "pipe:"
        )  # a session of its own: whatever the command starts ends with it
        with tempfile.TemporaryFile() as stderr:
            with _failing():
                if own:
                    options = {
                        "stdin": subprocess.DEVNULL,
                        "stderr": stderr,
                        "start_new_session": True,
                    }
                    stream = opens.Pipe(
                        address.removeprefix("pipe:"),
                        mode="rb",
                        shell=True,
                        bufsize=0,
                        **options,
                    )
                else:
                    stream = opens.gopen(address, "rb", bufsize=0)
            process = getattr(stream, "proc", None)

            def chunks():
                output = (stream.stream if process else stream).fileno()
                poll = select.poll()
                poll.register(output, select.POLLIN)
                while True:
                    if not poll.poll(timeout * 1000):
                        raise _Failure(f"no byte came for {timeout:g} s")
                    chunk = os.read(output, _CHUNK)
                    if not chunk:
                        break
                    yield chunk
                if process:
                    try:
                        status = process.wait(timeout)
                    except subprocess.TimeoutExpired:
                        raise _Failure(
                            f"the command did not end within {timeout:g} s of its last byte"
                        ) from None
                    if status:
                        raise _Failure(
                            f"the command ended with status {status}{_last_words(stderr)}"
                        )

            try:
                yield 0, None, chunks()
            finally:
                if (
                    process and process.returncode is None
                ):  # not waited for yet, so its number is still its own
                    if own:
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.wait()
                stream.stream.close() if process else stream.close()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to http and https alone, and from https to https."""

    def redirect_request(self, request, file, code, message, headers, newurl):
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (
            request.type == "https" and scheme == "http"
        ):
            raise _Failure(
                f"it redirects from {request.type} to {words(scheme)}", final=True
            )
        return super().redirect_request(request, file, code, message, headers, newurl)


def _http_alone():
    """What opens http and https, and neither files nor ftp, to which urllib's own would follow."""
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
    """An attempt has failed. final: the next one would fail alike; wait: seconds that the server asks for; anew: what has come
    so far is of no use."""

    def __init__(self, said, final=False, wait=0.0, anew=False):
        super().__init__(said)
        self.final, self.wait, self.anew = final, wait, anew


@contextmanager
def _failing():
    """Turns whatever the other side does into a `_Failure`."""
    try:
        yield
    except _Failure:
        raise
    except urllib.error.HTTPError as error:
        with error:
            after = error.headers.get("Retry-After", "")
            wait = float(after) if re.fullmatch(r"\d{1,9}", after, re.ASCII) else 0.0
            beyond = error.code == 416  # less lies there than has come
            final = 400 <= error.code < 500 and error.code not in _AGAIN and not beyond
            raise _Failure(
                f"HTTP {error.code} {words(error.reason)}", final, wait, anew=beyond
            ) from None
    except TimeoutError:
        raise _Failure("nothing came for too long") from None
    except urllib.error.URLError as error:
        raise _Failure(words(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failure(
            words(error), final=isinstance(error, FileNotFoundError)
        ) from None
    except Exception as error:  # what a scheme of WebDataset's needs is not installed, or its address is no address
        raise _Failure(words(error), final=True) from None


def _webdataset():
    """WebDataset's way to open things; not imported before it is needed, since it takes torch along, for seconds."""
    return importlib.import_module("webdataset.gopen")


def _so_far(file):
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return file.tell(), digest


def _anew(file):
    file.seek(0)
    file.truncate()
    return 0, hashlib.sha256()


def _last_words(file):
    file.seek(max(0, file.seek(0, os.SEEK_END) - 300))
    said = file.read().decode("utf-8", "replace").strip()
    return f" and said {words(said)!r}" if said else ""
