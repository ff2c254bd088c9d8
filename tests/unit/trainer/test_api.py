"""The Python API, as far as it starts no training."""

import contextlib

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
