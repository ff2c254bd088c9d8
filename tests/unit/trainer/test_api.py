"""The Python API, as far as it starts no training."""

import contextlib
import datetime

import pytest

import trainer.training.loop
from trainer import api
from trainer.errors import RunStopped


@pytest.mark.parametrize(
    ("interrupted", "error"), [(True, KeyboardInterrupt), (False, RunStopped)]
)
def test_an_interrupt_stays_one_after_the_checkpoint(
    interrupted, error, monkeypatch, tmp_path
):
    """A notebook's stop button; a scheduler's SIGTERM is a stop."""

    def stopped(*_):
        raise RunStopped("its checkpoint is written", interrupted)

    def joined(*_):
        return contextlib.nullcontext()

    monkeypatch.setattr(trainer.training.loop, "train", stopped)
    monkeypatch.setattr(api, "_joined", joined)
    with pytest.raises(error, match="its checkpoint is written"):
        api.fit(tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize(
    "first", [datetime.date(2014, 7, 1), datetime.datetime(2014, 7, 1)]
)
def test_a_split_takes_dates_and_numbers(first):
    config = api._config_of(
        (), {"split": {"kind": "timeline", "test": first, "validation": 0.2}}
    )
    assert config.split.test.startswith("2014-07-01")
    assert config.split.validation == "0.2"
