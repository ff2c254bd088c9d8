"""What a pipe hears of work that takes long."""

import threading
import time

import pytest

from trainer.files import progress
from trainer.files.progress import Heartbeat, Stages


def test_a_pipe_hears_from_time_to_time(capsys):
    said = []
    heard = threading.Event()

    def say():
        said.append(time.monotonic())
        if len(said) == 3:
            heard.set()

    begun = time.monotonic()
    with Heartbeat(say, first=0.05, every=0.1):
        assert heard.wait(5)
    assert said[0] - begun >= 0.05
    assert said[2] - said[1] >= 0.09
    count = len(said)
    time.sleep(0.25)
    assert len(said) == count  # it is over


def test_what_was_said_meanwhile_is_enough():
    said = []
    with Heartbeat(lambda: said.append(1), first=0.15, every=0.15) as heartbeat:
        for _ in range(10):
            heartbeat.reset()
            time.sleep(0.03)
    assert said == []


def test_where_a_bar_is_drawn_nothing_is_said():
    said = []
    with Heartbeat(lambda: said.append(1), shown=False, first=0.0, every=0.01):
        time.sleep(0.05)
    assert said == []


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_stage_is_told_in_a_pipe(shown, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_FIRST", 0.05)
    monkeypatch.setattr(progress, "_EVERY", 0.05)
    with (
        Stages(shown) as stages,
        stages("sorting, writing shards", total=100) as advance,
    ):
        advance(40)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    if not shown:
        assert lines == []
        return
    assert lines and set(lines) == {"sorting, writing shards: 40 % after 0 s"}


def test_a_short_stage_says_nothing_in_a_pipe(capsys):
    with Stages() as stages, stages("reading the logs"):
        pass
    assert capsys.readouterr() == ("", "")
