"""A trainer's step: what a number that is none does to it, what it waits for, and the next batch beside it."""

import numpy as np
import pytest
import torch

from syncrec.losses import shapley
from syncrec.model import select_decayed_parameters
from tests.helpers.runs import (
    METRICS,
    SmallRun,
    best_of,
    everything,
    rank_of_one,
    same,
    train,
)
from tests.helpers.waiting import LookAhead, waits
from trainer.checkpoint.layout import RunState
from trainer.data.loading.histories import UserHistories
from trainer.data.loading.stream import TrainBatches
from trainer.distributed.agreement import Signals
from trainer.errors import InputError, NonFiniteLoss
from trainer.training.gradients import Gradients, HostCopy
from trainer.training.step import RankFailure, Trainer

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks:
        yield SmallRun(
            tmp_path_factory.mktemp("step"),
            ranks,
            "optimizer.clip=0.5",
            "optimizer.schedule=linear",
        )


def trainer_of(run, *settings):
    return run.trainer(
        config=run.configured(
            "optimizer.clip=0.5", "optimizer.schedule=linear", *settings
        )
    )


def batches(trainer, count):
    config = trainer.config
    given = (
        config.model.max_length,
        config.model.mutual_information_pooling,
        config.negatives,
        config.stream,
    )
    stream = iter(
        TrainBatches(
            trainer.plan,
            0,
            trainer.step,
            *given,
            accumulation=config.accumulation,
        )
    )
    return [next(stream).batch for _ in range(count)]


def spoil_rows(monkeypatch, trainer):
    """The look-up's gradient is no number in one place, as a loss would make it."""
    check = Trainer._guard_gradient

    def checked(self, gradient, *others):
        gradient[0, 0] = float("inf")
        return check(self, gradient, *others)

    monkeypatch.setattr(trainer, "_guard_gradient", checked.__get__(trainer))


def spoil_dense(monkeypatch, trainer):
    """One weight's gradient alone is no number: the loss and the looked-up vectors' are."""
    weight = trainer.model.cross_tower.outer.bias
    monkeypatch.setattr(
        weight,
        "spoiled",
        weight.register_hook(lambda grad: grad * float("nan")),
        raising=False,
    )


def spoil_loss(monkeypatch, trainer):
    """The whole step."""
    forward = trainer.model.forward

    def spoiled(*arguments):
        loss, report = forward(*arguments)
        return loss * float("nan"), report

    monkeypatch.setattr(trainer.model, "forward", spoiled)


OPTIMIZERS = {
    "fused": [],
    "asked of the host": ["deepspeed.optimizer.params.fused=false"],
}


@pytest.mark.ranks
@STAGES
@pytest.mark.parametrize("spoil", [spoil_rows, spoil_dense, spoil_loss])
@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_says_so(
    run, monkeypatch, stage, spoil, settings
):
    """Weights, λ, table and both optimizers' states are as before to the bit, though the next step has been computed too."""
    trainer = trainer_of(run, f"optimizer.zero_stage={stage}", *settings)
    first, second, third = batches(trainer, 3)
    trainer.train_step(first)
    before = everything(trainer)
    with monkeypatch.context() as spoiled:
        spoil(spoiled, trainer)
        if settings:
            with pytest.raises(
                NonFiniteLoss,
                match=r"step 2 .* neither weights nor table were updated",
            ):
                trainer.train_step(second)
            assert same(everything(trainer), before)
            return
        trainer.train_step(second)
        if spoil is spoil_dense:
            trainer.model.cross_tower.outer.bias.spoiled.remove()
    held = everything(trainer)
    # Forward has made a new λ and φ̄, and FBGEMM has counted a look-up: all are put back when the step is told of.
    changed = {
        name for name in held if not torch.equal(held[name], before[name])
    }
    assert changed <= {
        "dense correction.lambda_D",
        "dense gap.sums_2D",
        "dense gap.noise_3D",
        "table updates",
    }
    with pytest.raises(
        NonFiniteLoss,
        match=r"step 2 \(batch 1 of epoch 0\): .* not finite; neither weights nor table were",
    ):
        trainer.train_step(third)
    assert same(everything(trainer), before) and trainer.step == 1


def test_settling_says_so_without_another_step(run, monkeypatch):
    trainer = trainer_of(run)
    first, second = batches(trainer, 2)
    trainer.train_step(first)
    trainer.settle()
    before = everything(trainer)
    spoil_rows(monkeypatch, trainer)
    trainer.train_step(second)
    with pytest.raises(NonFiniteLoss, match="step 2 "):
        trainer.settle()
    assert same(everything(trainer), before)
    trainer.settle()  # it is said once


@pytest.mark.ranks
@STAGES
def test_clipping_scales_each_gradient_to_the_norm(run, monkeypatch, stage):
    """The dense gradient's own, and that of the looked-up vectors without the shared negatives."""
    clip, found, norms = 1e-2, {}, []

    def check(self, gradient, counted, loss, signals):
        norms.append(counted.norm().item())
        return checked(self, gradient, counted, loss, signals)

    checked = Gradients.check
    monkeypatch.setattr(Gradients, "check", check)
    for limit in (clip, 0):
        settings = (
            f"optimizer.zero_stage={stage}",
            f"optimizer.clip={limit}",
            "table.optimizer=sgd",
        )
        trainer = trainer_of(
            run,
            *settings,
            "optimizer.schedule=constant",
            "table.learning_rate=1",
        )
        before = everything(trainer)
        trainer.train_step(batches(trainer, 1)[0])
        after = everything(trainer)
        moments = [
            value.flatten()
            for name, value in sorted(after.items())
            if name.endswith("//exp_avg")
        ]
        dense = torch.cat(moments) / (1 - trainer.config.optimizer.beta1)
        found[limit] = (
            after["table weight"] - before["table weight"],
            dense,
            trainer.state_figures()["gradient_norm"],
        )
    (table, dense, norm), (free_table, free_dense, free_norm) = (
        found[clip],
        found[0],
    )
    assert (
        norm == free_norm == pytest.approx(free_dense.norm().item(), rel=1e-5)
        and norm > 10 * clip
        and norms[0] > clip
    )
    torch.testing.assert_close(
        dense, free_dense * (clip / norm), rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(
        table, free_table * (clip / norms[0]), rtol=1e-3, atol=1e-7
    )


@pytest.mark.ranks
@STAGES
def test_a_run_that_looks_ahead_is_the_same_to_the_bit(run, stage):
    """The next batch's ids are exchanged before this batch's update, its rows looked up after it."""
    plain, ahead = (
        trainer_of(run, f"optimizer.zero_stage={stage}") for _ in range(2)
    )
    given = batches(plain, 4)
    steps = LookAhead(ahead, given)
    for batch in given:
        loss, _ = plain.train_step(batch)
        other, _ = steps.step()
        assert torch.equal(loss, other)
    assert same(everything(ahead), everything(plain))


SETTINGS = [[f"optimizer.zero_stage={stage}"] for stage in (0, 1, 2)]
SETTINGS += [
    [f"model.loss={loss}", "model.precision=bf16"]
    for loss in ("bpr", "bce", "bpr_probability")
]
SETTINGS += [["model.loss_correction=shapley"], ["model.encoder=gru"]]
HARM = ["model.loss_correction=harm", "model.stop_gradient=harm"]
SETTINGS += [HARM]
SETTINGS += [
    [
        "negatives.shared=0",
        "model.gate=sequence",
        "optimizer.clip=0",
        "table.optimizer=adagrad",
    ]
]


@pytest.mark.parametrize("settings", SETTINGS, ids="; ".join)
def test_a_step_waits_for_nothing_but_the_one_before(run, settings):
    """At stage 3 DeepSpeed has the host look at the gradient's norm."""
    trainer = trainer_of(run, *settings)
    given = batches(trainer, 4)
    trainer.train_step(given[0])  # what is made once is made
    assert not waits(trainer, given[1:])


def test_what_the_model_cannot_be_built_for_is_one_line(run, monkeypatch):
    monkeypatch.setattr(shapley, "MOST_DOMAINS", 1)
    with pytest.raises(
        InputError,
        match=r"^model\.loss_correction is shapley: with 2 domains it takes 4 more [^\n]*$",
    ):
        trainer_of(run, "model.loss_correction=shapley")


@pytest.mark.ranks
@STAGES
@pytest.mark.parametrize(
    "settings", [[], ["model.encoder=gru"]], ids=["transformer", "gru"]
)
def test_a_checkpoint_goes_on_to_the_same_bits_with_shapley_values(
    run, tmp_path, stage, settings
):
    """λ is saved, and what comes after it is as it would have been, dropout on."""
    settings = [
        "model.loss_correction=shapley",
        "model.blocks=2",
        f"optimizer.zero_stage={stage}",
        *settings,
    ]
    made = SmallRun(tmp_path, run.ranks, *settings)
    made.folder.mkdir()
    (made.folder / "metrics.jsonl").write_text(METRICS)
    trainer = train(made.trainer(), 2)
    lambda_D = trainer.model.correction.lambda_D
    assert (
        lambda_D.sum().item() == pytest.approx(1)
        and trainer.state_figures()["alpha"] is None
    )
    checkpoint = made.save(trainer, RunState(2, 0, best_of(2), 0, 0, 1.0))
    after = everything(train(trainer, 2))
    again = made.trainer(checkpoint, 2)
    assert torch.equal(again.model.correction.lambda_D, lambda_D)
    assert same(everything(train(again, 2)), after)


@pytest.mark.ranks
@STAGES
def test_a_checkpoint_goes_on_to_the_same_bits_with_harm(run, tmp_path, stage):
    """The gap's mean and noise are saved; λ and the gates follow from them."""
    settings = [*HARM, f"optimizer.zero_stage={stage}"]
    made = SmallRun(tmp_path, run.ranks, *settings)
    made.folder.mkdir()
    (made.folder / "metrics.jsonl").write_text(METRICS)
    trainer = train(made.trainer(), 2)
    gap = trainer.model.gap
    noise_3D = torch.tensor([[1e-4] * 2, [0.5] * 2, [0.004] * 2])
    gap.noise_3D = noise_3D.double()
    gap.sums_2D = torch.tensor([[-0.3, 0.3], [0.5, 0.5]], dtype=torch.float64)
    checkpoint = made.save(trainer, RunState(2, 0, best_of(2), 0, 0, 1.0))
    after = everything(train(trainer, 2))
    again = made.trainer(checkpoint, 2)
    harmed, unharmed = again.model.gap.unharmed_D.tolist()
    assert harmed < 0.1 and unharmed == 1
    assert same(everything(train(again, 2)), after)


@pytest.mark.ranks
@STAGES
def test_weight_decay_leaves_biases_norms_and_scales_alone(run, stage):
    """AdamW takes rate · decay of what a weight was; the rest is as without."""
    decay = 0.3
    states = {}
    for value in (0, decay):
        settings = (
            f"optimizer.zero_stage={stage}",
            f"optimizer.weight_decay={value}",
            "optimizer.schedule=constant",
            "model.learn_scales=true",
        )
        trainer = trainer_of(run, *settings)
        for parameter in trainer.model.parameters():
            assert parameter.requires_grad
        before = everything(trainer)
        train(trainer, 1)
        states[value] = everything(trainer)
    rate = trainer.config.optimizer.learning_rate
    decayed = {
        f"dense {name}" for name in select_decayed_parameters(trainer.model)
    }
    for name, value in before.items():
        lost = (
            rate * decay * value if name in decayed else torch.zeros_like(value)
        )
        if name.startswith("dense "):
            torch.testing.assert_close(
                states[0][name] - states[decay][name],
                lost,
                rtol=1e-3,
                atol=2e-7,
                msg=name,
            )
    assert {
        "dense correction.alpha",
        "dense cross_experts.blocks.0.b1",
    } <= before.keys() - decayed


@pytest.mark.ranks
@STAGES
def test_a_checkpoint_with_weight_decay_goes_on_at_any_stage(
    run, tmp_path, stage
):
    settings = ["optimizer.weight_decay=0.1", f"optimizer.zero_stage={stage}"]
    made = SmallRun(tmp_path, run.ranks, *settings)
    made.folder.mkdir()
    (made.folder / "metrics.jsonl").write_text(METRICS)
    trainer = train(made.trainer(), 2)
    checkpoint = made.save(trainer, RunState(2, 0, best_of(2), 0, 0, 1.0))
    after = everything(train(trainer, 2))
    assert same(everything(train(made.trainer(checkpoint, 2), 2)), after)
    for other in {(stage + 1) % 4, (stage + 2) % 4}:
        config = made.configured(settings[0], f"optimizer.zero_stage={other}")
        elsewhere = everything(train(made.trainer(checkpoint, 2, config), 2))
        assert elsewhere.keys() == after.keys()
        for name, value in after.items():
            torch.testing.assert_close(
                elsewhere[name], value, rtol=1e-5, atol=1e-7, msg=name
            )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "negatives"),
    [*((stage, "shared") for stage in range(4)), (0, "own")],
)
def test_accumulation_over_four_is_one_batch(run, stage, negatives):
    """Losses, λ, table, dense model and both optimizers' states, after three steps of one update each."""
    settings = [
        f"optimizer.zero_stage={stage}",
        "global_batch_size=8",
        "model.dropout=0",
        "optimizer.eps=1e-4",  # a gradient that is rounding alone moves nothing
    ]
    if negatives == "own":
        settings += ["negatives.shared=0", "negatives.per_target=2"]
    reports, states = [], []
    for accumulation in (1, 4):
        trainer = trainer_of(run, *settings, f"accumulation={accumulation}")
        for batch in batches(trainer, 3):
            assert len(batch.micro_batches) == accumulation
            loss, report = trainer.train_step(batch)
            reports.append((loss, *vars(report).values()))
        states.append(everything(trainer))
        assert trainer.table.updates == 3
    for whole, cut in zip(reports[:3], reports[3:], strict=True):
        for value, expected in zip(cut, whole, strict=True):
            torch.testing.assert_close(
                value, expected, rtol=1e-6, atol=1e-6, equal_nan=True
            )
    whole, cut = states
    assert cut.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(
            cut[name], expected, rtol=1e-5, atol=1e-6, msg=name
        )


def test_a_batch_without_any_user_moves_no_row(run):
    """Nothing is looked up, by which an optimizer like Adam would be told of a row."""
    trainer = trainer_of(run, "negatives.shared=0")
    first, _ = batches(trainer, 2)
    trainer.train_step(first)
    config = trainer.config
    given = (
        config.model.max_length,
        config.model.mutual_information_pooling,
        config.negatives,
        config.stream,
    )
    nobody = UserHistories(
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int32),
        np.zeros(0, np.uint16),
    )
    empty = TrainBatches(trainer.plan, 0, 0, *given).build(0, 0, nobody)
    assert len(empty.distinct) == 0 and not empty.weight_B.any()
    before = everything(trainer)
    trainer.train_step(empty)
    trainer.settle()
    after = everything(trainer)
    assert after.pop("table updates") == before.pop("table updates") + 1
    assert all(
        torch.equal(after[name], before[name])
        for name in before
        if name.startswith("table ")
    )


def test_what_waits_is_found(run, monkeypatch):
    """By name, by a mask, in backward, and in what DeepSpeed does for itself."""
    asked = [
        "deepspeed.zero_optimization.compute_grad_norm=true",
        "deepspeed.timers.throughput.enabled=true",
    ]
    trainer = trainer_of(run, "optimizer.zero_stage=1", *asked)
    given = batches(trainer, 4)
    trainer.train_step(given[0])
    forward = trainer.model.forward

    def waiting(*arguments):
        loss, report = forward(*arguments)
        float(loss.detach())
        torch.tensor([1.0], device=loss.device)
        (report.lambda_D * 2)[report.lambda_D > 0].sum()
        loss.register_hook(lambda grad: grad if grad > 0 else -grad)
        return loss, report

    monkeypatch.setattr(trainer.model, "forward", waiting)
    found = waits(trainer, given[1:])
    for expected in (
        "__float__ in",
        "index in",
        "__bool__ in",
        "tensor in",
        "runtime/utils.py",
        "synchronize in",
    ):
        assert any(expected in line for line in found), (expected, found)


# What the ranks signal each other with a step.


@pytest.fixture(params=[True, False], ids=["on the host", "on a device"])
def lag(request, monkeypatch):
    """Whether what comes of a step is known at once, or, as on a device, only when the step is settled."""
    monkeypatch.setattr(HostCopy, "on_host", request.param)
    return 0 if request.param else 1


@pytest.mark.ranks
@STAGES
@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_with_which_a_rank_signals_trouble_changes_nothing(
    run, stage, settings
):
    trainer = trainer_of(run, f"optimizer.zero_stage={stage}", *settings)
    first, second, third = batches(trainer, 3)
    trainer.train_step(first)
    before = everything(trainer)
    with pytest.raises(RankFailure):
        trainer.train_step(second, signals=lambda: Signals(trouble=True))
        trainer.train_step(third)
    assert same(everything(trainer), before) and trainer.step == 1
    trainer.settle()  # it is said once


@pytest.mark.parametrize(
    "told",
    [
        {"stop": True},
        {"due": True},
        {"writing": True},
        {"stop": True, "writing": True},
    ],
)
def test_what_is_signalled_with_a_step_is_known_with_its_number(run, lag, told):
    trainer = trainer_of(run)
    first, second = batches(trainer, 2)
    assert trainer.signals == (-1, Signals())
    trainer.train_step(first, signals=lambda: Signals(**told))
    assert trainer.signals == ((-1, Signals()) if lag else (0, Signals(**told)))
    trainer.train_step(second)
    assert trainer.signals == ((0, Signals(**told)) if lag else (1, Signals()))
    trainer.settle()
    assert trainer.signals == (1, Signals())


def test_a_step_that_is_not_finite_and_in_trouble_is_in_trouble(
    run, monkeypatch
):
    """What the loss of a rank without a batch is says nothing."""
    trainer = trainer_of(run)
    spoil_rows(monkeypatch, trainer)
    trainer.train_step(
        batches(trainer, 1)[0], signals=lambda: Signals(trouble=True)
    )
    with pytest.raises(RankFailure):
        trainer.settle()


def test_the_next_batch_is_asked_for_once_forward_is_queued_and_sent_after_backward(
    run, monkeypatch
):
    """What the host waits for there passes while a device computes."""
    trainer = trainer_of(run)
    first, second = batches(trainer, 2)
    order = []
    engine, prefetcher = trainer.engine, trainer._prefetcher
    methods = [
        (engine, "forward"),
        (engine, "backward"),
        (prefetcher, "send"),
        (trainer, "_guard_gradient"),
    ]
    for owner, name in methods:
        noted = getattr(owner, name)

        def call(*arguments, noted=noted, name=name):
            order.append(name)
            return noted(*arguments)

        monkeypatch.setattr(owner, name, call)
    ready = trainer.prepare(first)

    def following():
        order.append("following")
        return trainer.prepare(second)

    trainer.train_step(ready, following)
    assert order == [
        "send",
        "forward",
        "following",
        "backward",
        "send",
        "_guard_gradient",
    ]
