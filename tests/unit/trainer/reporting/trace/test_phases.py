"""The clock of phases."""

import time

from trainer.reporting.trace.phases import (
    BETWEEN,
    EXCHANGES,
    FORWARD,
    PHASES,
    SUMS,
    PhaseClock,
)


def test_seconds_go_to_the_phase_that_lasts(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = PhaseClock()
    heard = []
    clock.listeners.append(lambda phase, now: heard.append((phase, now)))
    clock.begin(FORWARD)
    with clock.within(SUMS):
        assert clock.phase == SUMS
    clock.begin(BETWEEN)
    assert clock.seconds[BETWEEN] == 1.0
    assert clock.seconds[FORWARD] == 2.0 + 4.0
    assert clock.seconds[SUMS] == clock.exchange_seconds() == 3.0
    assert heard == [
        (FORWARD, 1.0),
        (SUMS, 3.0),
        (FORWARD, 6.0),
        (BETWEEN, 10.0),
    ]


def test_a_failure_within_a_phase_ends_it():
    clock = PhaseClock()
    try:
        with clock.within(SUMS):
            raise ValueError
    except ValueError:
        assert clock.phase == BETWEEN


def test_a_phase_costs_less_than_a_microsecond_or_so():
    clock = PhaseClock()
    begun = time.perf_counter()
    for _ in range(10_000):
        clock.begin(FORWARD)
    seconds = time.perf_counter() - begun
    # About 0.2 microseconds; a step has some twenty phases, and takes 10 ms at least.
    assert seconds / 10_000 < 20e-6


def test_exchanges_are_phases():
    assert set(EXCHANGES) < set(PHASES)
