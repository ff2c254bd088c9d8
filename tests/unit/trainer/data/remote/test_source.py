"""Datasets that lie elsewhere, behind a server and commands that misbehave: all of it comes, or what does not is named."""

import fcntl
import functools
import json
import multiprocessing
import os
import pickle
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.made import draw_histories, write_dataset
from trainer.config.stream import SourceConfig
from trainer.data.format.dataset import FILE_NAME, USERS, Dataset
from trainer.data.format.shards import ShardFile, read_blocks
from trainer.data.remote import cache, source
from trainer.data.remote.source import FetchFailed
from trainer.errors import InputError, exit_on_input_error
from trainer.files.redact import is_address, redact_location

SHARD = "shards/000001.tar"
FORK = multiprocessing.get_context("fork")
PATIENCE = 120  # seconds for what surely comes


class Handler(BaseHTTPRequestHandler):
    """Serves a folder, with what a test has put up for a file in the place of the next answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.partition("?")[0].removeprefix("/folder/")
        server, path = self.server, self.server.folder / name
        with server.lock:
            server.asked.append(
                (
                    name,
                    self.headers.get("Range"),
                    self.headers.get("Authorization"),
                    self.path,
                )
            )
            fault = (
                server.faults[name].popleft()
                if server.faults[name]
                else server.always.get(name)
            )
        self.close_connection = True
        if not path.is_file():
            return self.answer(404, b"")
        (fault or ok)(self, path.read_bytes())

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header(
            "Content-Length", str(len(body) if length is None else length)
        )
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    @property
    def start(self):
        asked = self.headers.get("Range") if self.server.ranges else None
        return (
            int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        )

    def log_message(self, *_):
        pass


def ok(handler, body):
    if start := handler.start:
        return handler.answer(
            206,
            body[start:],
            Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}",
        )
    handler.answer(200, body)


def half(handler, body):
    """The headers of an answer that is whole, and half of it."""
    start, left = handler.start, body[handler.start :]
    span = (
        {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        if start
        else {}
    )
    handler.answer(
        206 if start else 200, left[: len(left) // 2], len(left), **span
    )


def drop(handler, body):
    half(handler, body)
    handler.wfile.flush()


def reset(handler, body):
    half(handler, body)
    handler.wfile.flush()
    handler.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
    )
    handler.connection.close()


def refuse(handler, body):
    handler.connection.shutdown(socket.SHUT_RDWR)


def stall(handler, body):
    half(handler, body)
    handler.wfile.flush()
    handler.server.stalled.set()
    handler.server.over.wait(PATIENCE)


def never(handler, body):
    handler.server.stalled.set()
    handler.server.over.wait(PATIENCE)


def status(code, **headers):
    return lambda handler, body: handler.answer(
        code, b"<html>not now</html>", **headers
    )


def cut(handler, body):
    handler.answer(200, body[: len(body) // 2])


def more(handler, body):
    handler.answer(200, body + b"\0" * 512)


def wrong(handler, body):
    handler.answer(200, bytes([body[0] ^ 1]) + body[1:])


def garbage(handler, body):
    handler.wfile.write(b"\x00\xff\r\n\r\n" * 10)


def page(handler, body):
    handler.answer(200, b"<html>Welcome to the hotel's network</html>")


def chunked(handler, body):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(
        b"%x\r\n%s\r\n" % (len(body) // 2, body[: len(body) // 2])
    )


def elsewhere(handler, body):
    handler.answer(
        206, body[7:], Content_Range=f"bytes 7-{len(body) - 1}/{len(body)}"
    )


FAULTS = [
    drop,
    reset,
    refuse,
    stall,
    never,
    cut,
    more,
    wrong,
    garbage,
    page,
    chunked,
    elsewhere,
]
FAULTS += [status(500), status(503, Retry_After="0"), status(408), status(429)]
NAMES = [fault.__name__ for fault in FAULTS[:-4]] + ["500", "503", "408", "429"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The dataset as it lies there: forty users in four shards."""
    return write_dataset(
        tmp_path_factory.mktemp("there") / "folder",
        draw_histories(40),
        cuts=(10, 20, 30),
        streams=2,
    )


@pytest.fixture
def serve(there, monkeypatch):
    """Starts a server of a folder, the dataset's if none is given."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def start(folder=there.folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.folder, server.ranges, server.asked, server.lock = (
            Path(folder),
            True,
            [],
            threading.Lock(),
        )
        server.faults, server.always = defaultdict(deque), {}
        server.stalled, server.over = threading.Event(), threading.Event()
        server.handle_error = lambda *_: (
            None
        )  # a connection that breaks is what is wanted here
        server.daemon_threads, server.block_on_close = True, False
        server.address = f"http://127.0.0.1:{server.server_port}/folder"
        threading.Thread(
            target=functools.partial(server.serve_forever, 0.01), daemon=True
        ).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def load(tmp_path):
    """Loads the dataset of an address into a cache of this test's."""

    def load(address, **settings):
        quick = {
            "cache": str(tmp_path / "cache"),
            "retry_seconds": 0.001,
            "timeout_seconds": 30.0,
        } | settings
        return Dataset.load(address, source_config=SourceConfig(**quick))

    return load


def contents(dataset, order=None):
    """Every user's history, by number; each is there once."""
    found = {}
    for number in range(len(dataset.shards)) if order is None else order:
        for first, block in read_blocks(dataset, dataset.shards[number]):
            ends = np.cumsum(block.lengths_B)
            for place, (end, length) in enumerate(
                zip(ends, block.lengths_B, strict=True)
            ):
                assert first + place not in found
                found[first + place] = block.items_N[
                    end - length : end
                ].tolist()
    return found


def sizes(folder):
    """What lies in a cache, by name, and what is coming."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def count(server, name):
    return sum(asked[0] == name for asked in server.asked)


def wait_for(what):
    for _ in range(PATIENCE * 100):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def in_processes(number, call):
    """Calls `call(number)` in so many forked processes at once; all have to end well."""
    processes = [
        FORK.Process(target=call, args=(rank,)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * number


def test_a_dataset_behind_a_server_is_the_one_that_lies_there(
    server, there, load
):
    dataset = load(server.address)
    assert [asked[0] for asked in server.asked] == [
        FILE_NAME,
        *(file.name for file in there.files if file.name != USERS),
    ]
    assert (
        dataset.fingerprint == there.fingerprint
        and dataset.folder.name == there.fingerprint
    )
    assert dataset.place == server.address and there.place == str(there.folder)
    assert (
        contents(dataset) == contents(there) == contents(dataset, [3, 2, 1, 0])
        and len(contents(dataset)) == there.users
    )
    assert np.array_equal(dataset.lengths, there.lengths)
    for name in [file.name for file in (*there.files, *there.shards)]:
        assert (
            dataset.local(name).read_bytes()
            == (there.folder / name).read_bytes()
        )
        assert count(server, name) == 1
    assert contents(load(server.address + "/")) == contents(there)
    assert len(server.asked) == 2 + len(there.files) + len(
        there.shards
    )  # dataset.json anew, nothing else


def test_a_local_folder_is_read_where_it_lies(there, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (there.folder, str(there.folder), f"file://{there.folder}"):
        dataset = Dataset.load(place, source_config=SourceConfig())
        assert dataset == there and dataset.local(SHARD) == there.folder / SHARD
        dataset.ahead([SHARD])
        assert contents(dataset) == contents(there)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_what_passes_is_lived_through(server, there, load, fault):
    quick = {"timeout_seconds": 0.3} if fault in (stall, never) else {}
    faulty = [SHARD, "vocabulary/1.parquet"] + (
        [FILE_NAME] if fault not in (wrong, more) else []
    )  # it has no checksum
    for name in faulty:
        server.faults[name] += [fault, fault]
    assert contents(load(server.address, **quick)) == contents(there)
    assert all(count(server, name) == 3 for name in faulty)


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_what_does_not_pass_is_named_and_nothing_of_it_is_left(
    server, there, load, fault
):
    dataset = load(
        server.address,
        attempts=3,
        **({"timeout_seconds": 0.3} if fault in (stall, never) else {}),
    )
    server.always[SHARD] = fault
    with pytest.raises(
        FetchFailed,
        match=r"000001\.tar cannot be fetched: .+\(3 attempts.*: look after the address",
    ) as error:
        contents(dataset)
    assert (
        str(error.value).startswith(f"{server.address}/{SHARD} ")
        and str(error.value).isprintable()
    )
    assert (
        error.value.one_rank
        and error.value.status == 2
        and count(server, SHARD) == 3
    )
    assert contents(dataset, [0, 2, 3]) == {
        user: h for user, h in contents(there).items() if not 10 <= user < 20
    }
    assert not [
        name
        for name in sizes(dataset.folder)
        if "part" in name or SHARD in name
    ]
    del server.always[SHARD]
    assert contents(dataset) == contents(there)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_cannot_pass_is_not_tried_again(server, load, code):
    dataset = load(server.address)
    server.always[SHARD] = server.always[FILE_NAME] = status(code)
    with pytest.raises(
        FetchFailed, match=rf"000001\.tar cannot be fetched: HTTP {code} \w+"
    ):
        dataset.local(SHARD)
    with pytest.raises(
        FetchFailed, match=rf"dataset\.json cannot be fetched: HTTP {code} "
    ):
        load(server.address)
    assert count(server, SHARD) == 1


def test_nobody_listens(load, serve):
    server = serve()
    dataset = load(server.address, attempts=2)
    server.shutdown()
    server.server_close()
    with pytest.raises(
        FetchFailed,
        match=r"000001\.tar cannot be fetched: .*Connection refused.*2 attempts",
    ):
        dataset.local(SHARD)


def test_waits_grow_and_the_server_may_ask_for_longer_ones(
    server, load, monkeypatch
):
    waits = []
    monkeypatch.setattr(source.time, "sleep", waits.append)
    busy = [
        status(503, Retry_After=text)
        for text in ("7", "Wed, 21 Oct 2015 07:28:00 GMT", "999999999", "-1")
    ]
    server.faults[SHARD] += [drop, drop, drop, *busy]
    load(server.address, attempts=8, retry_seconds=0.5).local(SHARD)
    assert all(
        0.5 <= wait / 0.5 / 2**number <= 1.5
        for number, wait in enumerate(waits[:3])
    )
    assert (
        7 <= waits[3] <= 60
        and 4 <= waits[4] <= 12
        and waits[5] == 60
        and 16 <= waits[6] <= 48
        and len(waits) == 7
    )


def test_it_goes_on_where_the_connection_broke(server, there, load):
    size = there.shards[1].bytes
    server.faults[SHARD] += [drop, reset, drop]
    dataset = load(server.address)
    assert (
        dataset.local(SHARD).read_bytes() == (there.folder / SHARD).read_bytes()
    )
    ranges = [asked[1] for asked in server.asked if asked[0] == SHARD]
    assert (
        ranges[0] is None
        and ranges[1] == f"bytes={size // 2}-"
        and ranges[-1] > ranges[1]
    )


def test_it_begins_anew_where_the_server_knows_no_ranges(server, there, load):
    server.ranges = False
    server.faults[SHARD] += [drop, drop]
    dataset = load(server.address)
    assert contents(dataset) == contents(there)
    assert [bool(asked[1]) for asked in server.asked if asked[0] == SHARD] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "fault",
    [elsewhere, wrong, status(416)],
    ids=["another range", "wrong bytes", "416"],
)
def test_a_first_half_is_thrown_away_where_the_second_does_not_fit(
    server, there, load, fault
):
    server.faults[SHARD] += [drop, fault]
    assert contents(load(server.address)) == contents(there)
    assert [bool(asked[1]) for asked in server.asked if asked[0] == SHARD] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 1}', "null"])
def test_a_dataset_json_of_something_else_is_refused(
    serve, load, tmp_path, text
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE_NAME).write_text(text)
    server = serve(tmp_path / "other")
    with pytest.raises(
        InputError,
        match=r"/folder/dataset\.json has format_version .*prepare the dataset again",
    ):
        load(server.address)
    assert len(server.asked) == 1


@pytest.mark.ranks
def test_processes_fetch_each_file_once_between_them(server, there, load):
    whole = contents(there)

    def read(rank):
        dataset = load(server.address)
        dataset.ahead(shard.name for shard in dataset.shards[::-1])
        for order in np.random.default_rng(rank).permuted(
            np.tile(np.arange(4), (3, 1)), axis=1
        ):
            assert contents(dataset, order) == whole

    in_processes(4, read)
    asked = Counter(asked[0] for asked in server.asked)
    assert (
        asked.pop(FILE_NAME) == 4
        and set(asked.values()) == {1}
        and len(asked) == len(there.files) - 1 + len(there.shards)
    )


def least(there, shards):
    """Bytes of a cache for so many shards."""
    return sum(file.bytes for file in there.files) + shards * max(
        shard.bytes for shard in there.shards
    )


def test_a_cache_smaller_than_the_dataset_keeps_its_bounds(server, there, load):
    dataset, whole = (
        load(server.address, cache_bytes=least(there, 1)),
        contents(there),
    )
    dataset.local(USERS)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for number in order:
            server.faults[there.shards[number].name].append(drop)
            found = contents(dataset, [number])
            assert (
                all(found[user] == whole[user] for user in found)
                and len(found) == 10
            )
            assert sum(sizes(dataset.folder).values()) <= least(there, 1)
    for file in there.files:
        assert count(server, file.name) == 1


def test_the_shards_read_longest_ago_make_room(server, there, load):
    dataset = load(server.address, cache_bytes=least(there, 2) + 100)
    shards = [shard.name for shard in there.shards]
    for name in (shards[0], shards[1], shards[0], shards[2]):
        dataset.local(name)
    assert {name for name in shards if (dataset.folder / name).exists()} == {
        shards[0],
        shards[2],
    }


@pytest.mark.ranks
def test_processes_share_a_cache_that_is_too_small_for_them(
    server, there, load
):
    whole = contents(there)

    def read(rank):
        dataset = load(server.address, cache_bytes=least(there, 1), attempts=2)
        for order in np.random.default_rng(rank).permuted(
            np.tile(np.arange(4), (15, 1)), axis=1
        ):
            dataset.ahead(dataset.shards[number].name for number in order)
            assert contents(dataset, order) == whole

    in_processes(4, read)
    folder = load(server.address).folder
    assert not [name for name in sizes(folder) if name.endswith(".part")]
    assert sum(sizes(folder).values()) <= least(there, 4)


def test_an_open_shard_outlives_its_place_in_the_cache(server, there, load):
    dataset = load(server.address, cache_bytes=least(there, 1))
    file = ShardFile(dataset, dataset.shards[0])
    for shard in dataset.shards[1:]:
        dataset.local(shard.name)
    assert not file.path.exists()
    blocks = [
        file.block(number).items_N.tolist() for number in range(file.count)
    ]
    assert blocks == [
        block.items_N.tolist()
        for _, block in read_blocks(there, there.shards[0])
    ]
    file.close()


@pytest.mark.ranks
def test_a_shard_stays_till_it_is_opened(server, there, load):
    """Between its path and its opening nobody else makes room of it, as `ShardFile` needs it."""
    dataset = load(server.address, cache_bytes=least(there, 1))
    path = dataset.local(SHARD)

    def read(_):
        other = load(server.address, cache_bytes=least(there, 1))
        for shard in (other.shards[0], other.shards[2], other.shards[3]):
            other.local(shard.name)

    in_processes(1, read)
    assert path.read_bytes() == (there.folder / SHARD).read_bytes()
    dataset.local(there.shards[0].name)
    assert not path.exists()


def test_too_small_a_cache_is_refused_with_the_bytes_it_needs(
    server, there, load
):
    with pytest.raises(
        InputError,
        match=rf"stream\.cache_bytes is 1000: .* have {least(there, 1)} bytes",
    ):
        load(server.address, cache_bytes=1000)


def die_while_it_fetches(server, load, fork):
    """A process is killed in the middle of a shard; with `fork`, one that it forked meanwhile lives on, and is returned."""
    left, right = FORK.Pipe()

    def fetch():
        dataset = load(server.address)
        threading.Thread(
            target=dataset.local, args=(SHARD,), daemon=True
        ).start()
        server_half.wait(PATIENCE)
        wait_for(
            lambda: [
                size
                for name, size in sizes(dataset.folder).items()
                if name.endswith(".part") and size
            ]
        )
        child = os.fork() if fork else None
        if child == 0:
            time.sleep(PATIENCE)
            os._exit(0)
        right.send(child)
        signal.pause()

    server_half = FORK.Event()

    def halt(handler, body):
        half(handler, body)
        server_half.set()
        server.over.wait(PATIENCE)

    server.faults[SHARD].append(halt)
    process = FORK.Process(target=fetch)
    process.start()
    assert left.poll(PATIENCE)
    child = left.recv()
    process.kill()
    process.join()  # with a time limit it would wait for the child too
    return child


@pytest.mark.ranks
@pytest.mark.parametrize("fork", [False, True])
def test_a_killed_process_leaves_what_the_next_goes_on_with(
    server, there, load, fork, monkeypatch
):
    monkeypatch.setattr(source, "_CHUNK", 512)
    child = die_while_it_fetches(server, load, fork)
    try:
        dataset = load(server.address)
        (part,) = [
            size
            for name, size in sizes(dataset.folder).items()
            if name.endswith(".part")
        ]
        assert (
            0 < part < there.shards[1].bytes
            and not (dataset.folder / SHARD).exists()
        )
        assert contents(dataset) == contents(there)
        assert [asked[1] for asked in server.asked if asked[0] == SHARD] == [
            None,
            f"bytes={part}-",
        ]
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.ranks
def test_what_killed_processes_left_makes_room(
    server, there, load, monkeypatch
):
    monkeypatch.setattr(source, "_CHUNK", 512)
    die_while_it_fetches(server, load, fork=False)
    dataset = load(server.address, cache_bytes=least(there, 1))
    assert [name for name in sizes(dataset.folder) if name.endswith(".part")]
    dataset.local(there.shards[0].name)
    assert not [
        name for name in sizes(dataset.folder) if name.endswith(".part")
    ]


def test_all_had_come_when_it_was_killed(server, there, load):
    dataset = load(server.address)
    part = dataset.cache._control(SHARD, "part")
    shutil.copy(there.folder / SHARD, part)
    assert (
        contents(dataset) == contents(there)
        and count(server, SHARD) == 0
        and not part.exists()
    )


def test_a_command_says_which_file_it_could_not_have(capsys):
    @exit_on_input_error
    def command():
        raise FetchFailed("http://host/0.tar cannot be fetched: gone")

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    expected = "error: http://host/0.tar cannot be fetched: gone: look after"
    assert capsys.readouterr().err.startswith(expected)


def test_who_waited_for_a_failure_does_not_repeat_it(server, load):
    dataset, raised = load(server.address), []
    path = dataset.cache._control(SHARD, "lock")
    first = cache._Lock(path, fcntl.LOCK_EX)

    def ask():
        try:
            dataset.local(SHARD)
        except FetchFailed as error:
            raised.append(error.problem)

    thread = threading.Thread(target=ask)
    thread.start()
    waits = f":{path.stat().st_ino} 0 EOF"
    wait_for(
        lambda: [
            line
            for line in Path("/proc/locks").read_text().splitlines()
            if "->" in line and waits in line
        ]
    )
    first.write("it was of no use")
    first.release()
    thread.join(PATIENCE)
    assert raised == ["it was of no use"] and count(server, SHARD) == 0
    assert dataset.local(SHARD).exists()  # who comes later tries


def test_a_file_damaged_in_the_cache_is_fetched_again(server, there, load):
    dataset = load(server.address)
    for name in (SHARD, "vocabulary/0.parquet", "lengths.npy"):
        path = dataset.local(name)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (dataset.folder / there.shards[2].name).parent.mkdir(exist_ok=True)
    (dataset.folder / there.shards[2].name).write_bytes(b"short")
    again = load(server.address)
    assert contents(again) == contents(there) and np.array_equal(
        again.lengths, there.lengths
    )
    assert count(server, SHARD) == 2


@pytest.mark.ranks
def test_a_full_disk_is_named_and_leaves_nothing(server, there, load):
    dataset = load(server.address)

    def fetch(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(
            InputError,
            match=r"shards/000001\.tar cannot be written \(File too large\): make room",
        ) as error:
            dataset.local(SHARD)
        assert type(error.value) is InputError  # not one that `skip` goes past

    in_processes(1, fetch)
    assert count(server, SHARD) == 1 and not [
        name
        for name in sizes(dataset.folder)
        if "part" in name or SHARD in name
    ]
    assert contents(dataset) == contents(there)


def test_a_cache_that_cannot_be_written_is_named(server, load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError,
        match=r"cannot be written \(Not a directory\).*stream\.cache",
    ):
        load(server.address, cache=str(tmp_path / "file" / "cache"))


def test_where_the_cache_lies(server, load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (
        load(server.address, cache="").folder.parent
        == tmp_path / "xdg/syncrec-trainer"
    )
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert (
            load(server.address, cache="").folder.parent
            == tmp_path / "home/.cache/syncrec-trainer"
        )
    assert (
        load(server.address, cache="~/here").folder.parent
        == tmp_path / "home/here"
    )


def test_shards_are_fetched_ahead(server, there, load):
    dataset = load(server.address, read_ahead=2)
    names = [shard.name for shard in there.shards]
    server.always[names[1]] = status(404)
    dataset.ahead(iter([names[0], names[1], names[2]]))
    wait_for(
        lambda: (dataset.folder / names[0]).exists() and count(server, names[1])
    )
    dataset.ahead([names[0], names[3]])
    wait_for(lambda: (dataset.folder / names[3]).exists())
    del server.always[names[1]]
    assert contents(dataset) == contents(there)
    assert [count(server, name) for name in names] == [1, 2, 1, 1]
    load(server.address, read_ahead=0).ahead(names)


def test_nothing_is_fetched_ahead_where_there_is_no_room(server, there, load):
    dataset = load(server.address, cache_bytes=least(there, 1))
    path = dataset.local(SHARD)
    dataset.cache._fetch_ahead(there.shards[0].name)
    assert path.exists() and count(server, there.shards[0].name) == 0


@pytest.mark.ranks
def test_reading_ahead_keeps_no_process_from_ending(server, there, load):
    dataset = load(server.address)
    server.always[SHARD] = never
    dataset.ahead([SHARD])
    assert server.stalled.wait(PATIENCE)

    def work(_):
        dataset.ahead(
            [there.shards[0].name]
        )  # a thread of its own, whatever the parent's is at
        wait_for((dataset.folder / there.shards[0].name).exists)
        dataset.ahead([there.shards[2].name])

    server.always[there.shards[2].name] = never
    in_processes(1, work)


@pytest.mark.ranks
def test_a_process_ends_whatever_its_read_ahead_is_at(there, tmp_path):
    """Without the short cut of `run_script`: the thread is stopped anywhere, with any lock in its hands."""
    lines = (
        "import sys, time",
        "from trainer.data.format.dataset import Dataset",
        "from trainer.data.remote.source import SourceConfig",
        f"dataset = Dataset.load('pipe:cat {there.folder}/{{}}', source_config=SourceConfig(cache=sys.argv[1]))",
        "dataset.local('shards/000000.tar')",
        "dataset.ahead([shard.name for shard in dataset.shards])",
        "time.sleep(float(sys.argv[2]))",
    )
    for number in range(3):
        arguments = [
            sys.executable,
            "-c",
            "\n".join(lines),
            str(tmp_path / str(number)),
            str(number / 1000),
        ]
        ended = subprocess.run(
            arguments, capture_output=True, text=True, timeout=PATIENCE
        )
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_dataset_goes_to_other_processes_as_it_is(server, there, load):
    dataset = load(server.address)
    dataset.local(SHARD)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (
        copy == dataset
        and copy.folder == dataset.folder
        and contents(copy) == contents(there)
    )
    assert count(server, SHARD) == 1


def command(text, folder):
    return f"pipe:F={shlex.quote(str(folder))}; {text}"


@pytest.mark.ranks
def test_a_command_is_a_source(there, load):
    assert contents(load(f"pipe:cat {there.folder}/{{}}")) == contents(there)
    assert contents(
        load(command("cat $F/{} | cat -", there.folder))
    ) == contents(there)


ENDINGS = {
    "fails": (
        "echo no such bucket >&2; exit 3",
        "the command ended with status 3 and said 'no such bucket'",
    ),
    "fails after all": ("cat $F/{}; exit 3", "the command ended with status 3"),
    "is none": ("no-such-command {}", "the command ended with status 127"),
    "ends early": (
        "head -c 50 $F/{}",
        "(50 of its [0-9]+ bytes came|is no JSON)",
    ),
    "writes nothing": ("true", "(0 of its [0-9]+ bytes came|is no JSON)"),
    "writes too much": (
        "cat $F/{} $F/{}",
        "(more than its [0-9]+ bytes came|is no JSON)",
    ),
    "writes without end": ("yes", "(more than its [0-9]+ bytes came|bytes)"),
    "kills itself": ("kill -9 $$", "the command ended with status -9"),
    "hangs": ("echo $$ >> $F.pids; sleep 1000; true", "no byte came for 0.3 s"),
    "hangs half-way": (
        "echo $$ >> $F.pids; head -c 50 $F/{}; sleep 1000 & wait",
        "no byte came for 0.3 s",
    ),
    "stays": (
        "echo $$ >> $F.pids; cat $F/{}; exec >&-; sleep 1000; true",
        "the command did not end within 0.3 s",
    ),
    "leaves a child": (
        "(echo $$ >> $F.pids; sleep 1000) & true",
        "no byte came for 0.3 s",
    ),
}


@pytest.fixture
def copied(there, tmp_path):
    shutil.copytree(there.folder, tmp_path / "copied")
    return tmp_path / "copied"


def groups_are_gone(copied):
    """Whatever a command has started: no process of its group is left."""
    groups = set(map(int, Path(f"{copied}.pids").read_text().split()))

    def alive():
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = (
                    path.read_text().rpartition(")")[2].split()[:3]
                )
            except OSError:
                continue
            if int(group) in groups and state != "Z":
                return True
        return False

    wait_for(lambda: not alive())
    return bool(groups)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ENDINGS)
def test_a_command_that_does_not_do_it_is_named(
    there, load, copied, how, monkeypatch
):
    text, said = ENDINGS[how]
    monkeypatch.setattr(source, "_LARGEST_IN_MEMORY", 10**6)
    quick = {"attempts": 2, "timeout_seconds": 0.3 if "0.3 s" in said else 30.0}
    # A shard that has come with the right checksum is right whatever the command does then.
    for only in (
        (FILE_NAME,)
        if how in ("fails after all", "stays")
        else (FILE_NAME, SHARD)
    ):
        choose = f"if test {{}} = {only}; then {text}; else cat $F/{{}}; fi"
        with pytest.raises(FetchFailed, match=said) as error:
            contents(load(command(choose, copied), **quick))
        assert (
            str(error.value).startswith("pipe:")
            and only in str(error.value)
            and str(error.value).isprintable()
        )
        if "pids" in text:
            assert groups_are_gone(copied)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ENDINGS)
def test_a_command_that_does_it_later_is_enough(
    there, load, copied, how, monkeypatch
):
    text, said = ENDINGS[how]
    monkeypatch.setattr(source, "_LARGEST_IN_MEMORY", 10**6)
    faulty = (
        SHARD if how == "writes without end" else f"{SHARD}|{FILE_NAME}"
    )  # what has no end is not tried again there
    tried = "n=$F.$(echo {} | tr / _); echo >> $n; test $(wc -l < $n) -gt 2"  # two times it goes wrong
    address = command(
        f"case {{}} in {faulty}) if {tried}; then cat $F/{{}}; else {text}; fi;; *) cat $F/{{}};; esac",
        copied,
    )
    quick = {"timeout_seconds": 0.3} if "0.3 s" in said else {}
    assert contents(load(address, attempts=9, **quick)) == contents(there)
    assert Path(f"{copied}.{FILE_NAME}").exists() == (FILE_NAME in faulty)


@pytest.mark.ranks
def test_a_command_is_ended_where_its_reader_gives_up(there, load, copied):
    """Too much came: nobody waits for the rest of it."""
    dataset = load(
        command(
            "if test {} = "
            + SHARD
            + "; then echo $$ >> $F.pids; yes; else cat $F/{}; fi",
            copied,
        ),
        attempts=1,
    )
    with pytest.raises(FetchFailed, match="more than its"):
        dataset.local(SHARD)
    assert groups_are_gone(copied)


def fake_gsutil(folder, monkeypatch, text):
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "gsutil").write_text(
        f'#!/bin/sh\nname="${{2#gs://bucket/folder/}}"\n{text}\n'
    )
    (folder / "bin" / "gsutil").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.ranks
def test_any_scheme_of_webdataset_is_a_source(
    there, load, tmp_path, monkeypatch
):
    fake_gsutil(
        tmp_path,
        monkeypatch,
        f'test "$1" = cat && exec cat {there.folder}/"$name"',
    )
    assert contents(load("gs://bucket/folder/")) == contents(there)
    fake_gsutil(
        tmp_path,
        monkeypatch,
        'test "$name" = dataset.json && exec sleep 1000; exit 4',
    )
    with pytest.raises(
        FetchFailed,
        match=r"gs://bucket/folder/dataset\.json cannot be fetched: no byte came for 0.3 s",
    ):
        load("gs://bucket/folder", attempts=2, timeout_seconds=0.3)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        FetchFailed,
        match=r"gs://bucket/folder/dataset\.json cannot be fetched: .*gsutil",
    ):
        load("gs://bucket/folder")


def test_webdataset_rewrites_addresses(there, load, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"gs://bucket/=file://{there.folder}/")
    assert contents(load("gs://bucket")) == contents(there)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "s3://bucket/folder",
            r"s3 is no scheme .*pipe:aws s3 cp s3://bucket/folder/\{\} -",
        ),
        ("pipe:cat /folder/dataset.json", r"no \{\}"),
        ("http://", "no valid address"),
        ("http://host:port/folder", "no valid address"),
        ("https://user:pa/ss@host/folder", "no valid address"),
        ("https://[::1/folder", "no valid address"),
    ],
)
def test_what_is_no_address_is_refused(load, address, said):
    with pytest.raises(InputError, match=said) as error:
        load(address)
    assert "ss@" not in str(error.value)


HOSTILE = [
    "a;touch x",
    "$(touch x)",
    "`x`",
    "a b",
    "a'b",
    'a"b',
    "-n",
    "shards/-n",
    "*",
    "a?b",
    "a#b",
    "a%2e%2e",
    "дом",
    "{}",
]
HOSTILE += ["~", ".fetch/000001.lock", "shards/.a", "./a"]
HOSTILE += [
    "a//b",
    "a/",
    "a\\b",
    "shards/../../../x",
    "/etc/passwd",
    "..",
    "",
    "a\nb",
]


@pytest.mark.ranks
@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_elsewhere_are_refused(
    serve, there, load, tmp_path, name
):
    folder = tmp_path / "other"
    folder.mkdir()
    facts = json.loads((there.folder / FILE_NAME).read_text())
    facts["shards"][1]["name"] = name
    (folder / FILE_NAME).write_text(json.dumps(facts))
    server = serve(folder)
    for address in (server.address, f"pipe:cd {folder}; cat {{}}"):
        with pytest.raises(
            InputError, match=r"dataset\.json.*prepare the dataset again"
        ) as error:
            load(address)
        assert repr(name) in str(error.value) and str(error.value).isprintable()
    assert (
        not (tmp_path / "cache").exists()
        and len(server.asked) == 1
        and sizes(folder).keys() == {FILE_NAME}
    )


@pytest.mark.parametrize("name", [USERS, "shards/000000.tar"])
def test_a_name_that_comes_twice_is_refused(serve, there, load, tmp_path, name):
    (tmp_path / "other").mkdir()
    facts = json.loads((there.folder / FILE_NAME).read_text())
    facts["shards"][1]["name"] = name
    (tmp_path / "other" / FILE_NAME).write_text(json.dumps(facts))
    with pytest.raises(InputError, match="twice"):
        load(serve(tmp_path / "other").address)


def test_a_name_below_another_file_is_an_error_of_its_own(
    serve, there, load, tmp_path
):
    shutil.copytree(there.folder, tmp_path / "other")
    facts = json.loads((there.folder / FILE_NAME).read_text())
    facts["shards"][1]["name"] = "lengths.npy/000001.tar"
    (tmp_path / "other" / FILE_NAME).write_text(json.dumps(facts))
    with pytest.raises(
        InputError, match=r"lengths\.npy/000001\.tar cannot be written"
    ):
        contents(load(serve(tmp_path / "other").address))


def test_credentials_go_to_the_server_alone(serve, there, load):
    server, other = serve(), serve()
    address = (
        server.address.replace("http://", "http://anna:s%C3%A9cret%40@")
        + "?sig=hidden"
    )
    dataset = load(address)
    assert contents(dataset) == contents(there)
    assert {asked[2] for asked in server.asked} == {
        "Basic YW5uYTpzw6ljcmV0QA=="
    }
    assert all(asked[3].endswith("?sig=hidden") for asked in server.asked)
    server.always[FILE_NAME] = status(
        302, Location=f"{other.address}/{FILE_NAME}"
    )
    assert (
        load(address).fingerprint == there.fingerprint
        and other.asked[0][2] is None
    )
    server.always[FILE_NAME] = status(401)
    with pytest.raises(FetchFailed) as error:
        load(address)
    for text in (str(error.value), dataset.place, repr(dataset), str(dataset)):
        assert (
            "cret" not in text and "hidden" not in text and "anna" not in text
        )
    assert (
        f"127.0.0.1:{server.server_port}/folder/{FILE_NAME}?… cannot be fetched: HTTP 401"
        in str(error.value)
    )


@pytest.mark.ranks
def test_credentials_of_a_command_are_not_printed(load):
    with pytest.raises(FetchFailed) as error:
        load(
            "pipe:echo failed: ftp://anna:secret@host/ >&2; : https://anna:secret@host/{}?sig=hidden; exit 5",
            attempts=1,
        )
    assert "ftp://…@host/" in str(error.value) and "status 5" in str(
        error.value
    )
    assert not any(
        word in str(error.value) for word in ("secret", "anna", "hidden")
    )


def test_places():
    for text in (
        "http://h/f",
        "https://h",
        "pipe:cat {}",
        "gs://b/f",
        "s3://b",
    ):
        assert is_address(text) and redact_location(text) == text
    for text in ("data/all", "/data", "", "a:b", "C:\\data", Path("pipe")):
        assert not is_address(text) and redact_location(text) == str(text)
    assert (
        redact_location("https://a:b/c@d@h/f?x=y@z") == "https://…@z"
    )  # rather too little than too much


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_bytes", 0),
        ("attempts", 0),
        ("retry_seconds", -0.1),
        ("retry_seconds", float("nan")),
        ("timeout_seconds", 0.0),
        ("timeout_seconds", float("inf")),
        ("read_ahead", -1),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"stream\.{name} is {value}: give "):
        SourceConfig(**{name: value})


def test_a_server_sends_nobody_away_from_http(server, load):
    server.always[FILE_NAME] = status(
        302, Location=f"ftp://127.0.0.1:{server.server_port}/x"
    )
    with pytest.raises(
        FetchFailed,
        match=r"dataset\.json cannot be fetched: it redirects from http to ftp:",
    ):
        load(server.address)
    assert len(server.asked) == 1


def test_a_server_sends_nobody_from_https_to_http():
    request = urllib.request.Request("https://host/folder")
    with pytest.raises(
        source._Failure, match="it redirects from https to http"
    ):
        source._Redirects().redirect_request(
            request, None, 302, "", {}, "http://host/folder"
        )
    assert (
        source._Redirects()
        .redirect_request(request, None, 302, "", {}, "https://other/folder")
        .host
        == "other"
    )
