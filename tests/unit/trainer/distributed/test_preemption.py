"""Signals that ask a run to stop."""

import os
import signal
import threading

import pytest

from trainer.distributed.preemption import StopSignal


@pytest.fixture
def noted():
    """The handlers that were there before: they note what reaches them."""
    reached, numbers = [], (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {
        number: signal.signal(number, lambda sent, frame: reached.append(sent))
        for number in numbers
    }
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
)
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


def test_who_presses_ctrl_c_twice_does_not_wait(noted):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert noted == []


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
