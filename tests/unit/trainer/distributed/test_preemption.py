"""Signals that ask a run to stop."""

import os
import signal
import sys
import threading
import time

import pytest

from trainer import interrupts
from trainer.distributed.preemption import StopSignal


@pytest.fixture
def noted():
    """The handlers that were there before: they note what reaches them."""
    reached, numbers = [], interrupts.STOP_SIGNALS
    before = {
        number: signal.signal(number, lambda sent, frame: reached.append(sent))
        for number in numbers
    }
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.STOP_SIGNALS)
def test_a_request_to_stop_is_noted_and_reaches_nobody_else(noted, number):
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # schedulers say it more than once
        assert stop.asked
    assert noted == []
    os.kill(os.getpid(), number)
    assert noted == [number]


def test_who_presses_ctrl_c_twice_does_not_wait(noted, monkeypatch):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and stop.interrupted
        # The terminal has sent it to all, and a launcher passes it on.
        os.kill(os.getpid(), signal.SIGINT)
        later = time.monotonic() + 2
        monkeypatch.setattr(interrupts.time, "monotonic", lambda: later)
        os.kill(os.getpid(), signal.SIGINT)
    assert noted == []


def test_a_command_that_is_interrupted_twice_ends_at_once(noted, monkeypatch):
    monkeypatch.setattr(interrupts, "_SAME_PRESS", 0.0)
    monkeypatch.setattr(interrupts, "end_at_once", lambda: sys.exit(130))
    signal.signal(signal.SIGINT, interrupts.interrupt)
    with pytest.raises(SystemExit), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_terminal_that_was_closed_ends_no_run(noted, tmp_path):
    """Its lines go into nothing; a file goes on getting them."""
    terminal, of_the_process = os.openpty()
    file = (tmp_path / "log").open("w", encoding="utf-8")
    with open(of_the_process, "w", encoding="utf-8", closefd=False) as stream:
        os.close(terminal)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", file)
            with pytest.raises(OSError):
                print("nobody reads it", flush=True)
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.asked and not stop.interrupted
                print("into nothing", flush=True)
                print("into the file", file=sys.stderr, flush=True)
    file.close()
    assert (tmp_path / "log").read_text(encoding="utf-8") == "into the file\n"
    os.close(of_the_process)


def test_handlers_are_put_back_after_an_exception(noted):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_the_signals_alone(noted):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (
        seen == [(before, False)] and signal.getsignal(signal.SIGTERM) == before
    )
