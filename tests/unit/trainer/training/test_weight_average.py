"""The moving average of the dense weights, against its sum in float64, and where it goes."""

import pytest
import torch
from safetensors.torch import load_file

from syncrec.model import SyNCRec
from tests.helpers.runs import (
    METRICS,
    SmallRun,
    best_of,
    everything,
    rank_of_one,
    same,
    train,
)
from trainer.checkpoint.layout import RunState
from trainer.checkpoint.load import restore_best
from trainer.checkpoint.zero_state import (
    AVERAGE,
    gather_average,
    gather_state,
    put_average,
    take_average,
)
from trainer.errors import NonFiniteLoss
from trainer.run_files import DENSE, OPTIMIZER

DECAY = 0.7
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@pytest.fixture(scope="module")
def ranks():
    with rank_of_one() as one:
        yield one


def make_run(folder, ranks, *settings):
    run = SmallRun(folder, ranks, f"optimizer.ema={DECAY}", *settings)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(METRICS)
    return run


def average_of(history):
    """Σ d^(t − i) w_i / Σ d^(t − i), by name, in float64."""
    shares = [
        DECAY ** (len(history) - 1 - step) for step in range(len(history))
    ]
    averages = {}
    for name in history[0]:
        total = sum(
            share * weights[name].double()
            for share, weights in zip(shares, history, strict=True)
        )
        averages[name] = total / sum(shares)
    return averages


@pytest.mark.ranks
@STAGES
def test_the_average_is_that_of_float64_and_is_resumed_to_the_bit(
    tmp_path, ranks, stage
):
    """At each ZeRO stage; validation and the checkpoint's model are the average, training goes on with the weights."""
    settings = [
        f"optimizer.zero_stage={stage}",
        "optimizer.learning_rate=0.03",
        "optimizer.weight_decay=0.1",  # two groups of parameters
    ]
    run = make_run(tmp_path, ranks, *settings)
    trainer = run.trainer()
    assert trainer.evaluation_model() is trainer.engine.module
    history = []
    for _ in range(4):
        train(trainer, 1)
        history.append(gather_state(trainer.engine, True))
    average = gather_average(trainer.engine)
    expected = average_of(history)
    assert 0 < len(average) <= len(expected)
    for name, value in average.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name
        )
    ranked = trainer.evaluation_model().state_dict()
    folder = run.save(trainer, RunState(4, 0, best_of(4), 0, 0, 1.0))
    stored = load_file(folder / DENSE)
    restored = SyNCRec(run.config.model, len(run.dataset.domains))
    restore_best(folder, restored, trainer.table)
    for name, value in history[-1].items():
        model = average.get(name, value)
        assert torch.equal(stored[name], model)
        assert torch.equal(ranked[name], model)
        assert torch.equal(restored.state_dict()[name], model)
    moved = [
        name
        for name in average
        if not torch.equal(average[name], history[-1][name])
    ]
    assert len(moved) > len(average) / 2
    after = everything(train(trainer, 2))
    assert any(name.endswith(f"//{AVERAGE}") for name in after)
    assert same(everything(train(run.trainer(folder, 4), 2)), after)


def test_the_average_changes_no_step(tmp_path, ranks):
    run = make_run(tmp_path, ranks)
    averaged = everything(train(run.trainer(), 3))
    plain = run.configured("optimizer.ema=0")
    trainer = train(run.trainer(config=plain), 3)
    expected = everything(trainer)
    assert not any(AVERAGE in name for name in expected)
    assert averaged.keys() > expected.keys()
    assert same({name: averaged[name] for name in expected}, expected)
    assert trainer.evaluation_model() is trainer.engine.module


def test_a_run_that_goes_on_without_the_average_forgets_it(tmp_path, ranks):
    run = make_run(tmp_path, ranks)
    trainer = train(run.trainer(), 2)
    weights = gather_state(trainer.engine, True)
    folder = run.save(trainer, RunState(2, 0, best_of(2), 0, 0, 1.0))
    plain = run.configured("optimizer.ema=0")
    again = run.trainer(folder, 2, plain)
    assert gather_average(again.engine) == {}
    assert same(gather_state(again.engine, True), weights)


def test_a_step_that_is_not_made_leaves_the_average(
    tmp_path, ranks, monkeypatch
):
    run = make_run(tmp_path, ranks)
    trainer = train(run.trainer(), 2)
    before = everything(trainer)
    forward = trainer.model.forward

    def spoiled(*arguments):
        loss, report = forward(*arguments)
        return loss * float("nan"), report

    monkeypatch.setattr(trainer.model, "forward", spoiled)
    train(trainer, 1)
    with pytest.raises(NonFiniteLoss):
        trainer.settle()
    assert same(everything(trainer), before)


def test_the_model_and_the_weights_change_places_and_back():
    dense = {"w": torch.ones(2), "buffer": torch.ones(1)}
    optimizer = {
        "w//exp_avg": torch.zeros(2),
        "w//ema": torch.full((2,), 3.0),
        "step": torch.ones(()),
    }
    stored = dict(dense)
    state = dict(optimizer)
    put_average(stored, state)
    assert stored["w"].tolist() == [3, 3]
    assert state.keys() == {"w//exp_avg", "w//trained", "step"}
    take_average(stored, state)
    assert same(stored, dense) and same(state, optimizer)


def test_the_files_of_a_run_without_an_average_are_those_of_before(
    tmp_path, ranks
):
    run = SmallRun(tmp_path, ranks)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(METRICS)
    trainer = train(run.trainer(), 1)
    folder = run.save(trainer, RunState(1, 0, best_of(1), 0, 0, 1.0))
    states = {key.rpartition("//")[2] for key in load_file(folder / OPTIMIZER)}
    assert states == {"exp_avg", "exp_avg_sq", "step"}
    stored = load_file(folder / DENSE)
    assert same(stored, gather_state(trainer.engine, True))
