"""The thread that feeds a tracker: order, failures, secrets, the end."""

import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trainer.reporting.trackers.thread import TrackerThread
from trainer.reporting.trackers.tracker import Tracker

SECRET = "hunter2hunter2"


class Recorded(Tracker):
    """Keeps what it is given. failures: how many of the next calls fail."""

    name = "recorded"
    package = "json"

    def __init__(self, failures=0, message="no route", refused=()):
        self.calls, self.failures, self.message = [], failures, message
        self.refused = refused

    def _add(self, *call):
        if call in self.refused:
            raise ValueError("refused")
        if self.failures:
            self.failures -= 1
            raise ConnectionError(self.message)
        self.calls.append(call)

    def begin(self):
        self._add("begin")
        return f"https://user:{SECRET}@host/run?key={SECRET}"

    def log(self, scalars, step):
        self._add("log", step)

    def add_file(self, file):
        self._add("file", file.name)

    def end(self, state):
        self._add("end", state)


def run_thread(tracker, steps=(1, 2), **seconds):
    said = []
    thread = TrackerThread(tracker, said.append, **seconds)
    for step in steps:
        thread.log({"loss": 1.0}, step)
    thread.end("finished", [Path("run/report.html")])
    return said


WHOLE = [
    ("begin",),
    ("log", 1),
    ("log", 2),
    ("file", "report.html"),
    ("end", "finished"),
]


def test_calls_are_made_in_order_and_secrets_are_not_said(capsys):
    tracker = Recorded()
    said = run_thread(tracker)
    assert tracker.calls == WHOLE
    assert said == ["recorded: https://…@host/run?…"]
    assert capsys.readouterr().err == ""


@given(failures=st.integers(1, 12))
def test_a_server_that_comes_back_gets_all_but_few(failures):
    tracker = Recorded(failures)
    said = []
    thread = TrackerThread(tracker, said.append, retry_seconds=0.001)
    thread.log({"loss": 1.0}, 1)
    thread.log({"loss": 1.0}, 2)
    while ("begin",) not in tracker.calls:
        time.sleep(0.001)
    thread.end("finished", [Path("run/report.html")])
    # The run itself is begun however long that takes.
    assert tracker.calls == WHOLE
    assert said[-1] == "recorded: takes records again"


def test_one_that_is_away_is_one_warning_and_no_error(capsys, monkeypatch):
    monkeypatch.setenv("RECORDED_API_KEY", SECRET)
    tracker = Recorded(10**6, f"https://u:{SECRET}@host\nkey {SECRET}")
    assert run_thread(tracker, range(100)) == []
    warning, lost = capsys.readouterr().err.splitlines()
    assert SECRET not in warning and "hunter" not in warning
    assert warning.startswith("warning: recorded: ConnectionError: https://…@")
    assert "the run goes on without it" in warning
    # Beside the 100 records: the begin, the file and the end.
    assert "103 records or files were not sent" in lost


def test_a_call_that_is_refused_is_given_up(capsys):
    tracker = Recorded(refused=[("log", 1)])
    thread = TrackerThread(tracker, [].append, retry_seconds=0.001)
    thread.log({"loss": 1.0}, 1)
    thread.log({"loss": 1.0}, 2)
    while ("log", 2) not in tracker.calls:
        time.sleep(0.001)
    thread.end("finished", [])
    assert tracker.calls == [("begin",), ("log", 2), ("end", "finished")]
    assert "1 records or files were not sent" in capsys.readouterr().err


def test_no_step_waits_and_the_end_waits_for_a_limited_time(capsys):
    gone = threading.Event()

    class Hanging(Recorded):
        def log(self, scalars, step):
            gone.wait()

    begun = time.monotonic()
    run_thread(Hanging(), end_seconds=0.1)
    assert time.monotonic() - begun < 5
    assert "4 records or files were not sent" in capsys.readouterr().err
    gone.set()


def test_only_so_many_calls_wait_and_the_run_is_still_begun(monkeypatch):
    monkeypatch.setattr("trainer.reporting.trackers.thread._MOST_CALLS", 10)
    away = threading.Event()

    class Late(Recorded):
        def begin(self):
            away.wait()
            return super().begin()

    tracker = Late(failures=1)
    thread = TrackerThread(tracker, [].append, retry_seconds=0.001)
    for step in range(100):
        thread.log({"loss": 1.0}, step)
    away.set()
    while ("log", 99) not in tracker.calls:
        time.sleep(0.001)
    thread.end("finished", [])
    assert tracker.calls[0] == ("begin",)
    assert tracker.calls[-2:] == [("log", 99), ("end", "finished")]
    assert len(tracker.calls) <= 11
