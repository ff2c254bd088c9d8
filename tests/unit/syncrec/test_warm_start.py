"""A model's weights for other domains and another span of time."""

import pytest
import torch

from syncrec.config import ModelConfig
from syncrec.layers.time_encoding import TICKS, Clock
from syncrec.model import SyNCRec
from syncrec.warm_start import grow_state
from tests.unit.syncrec.test_model import make_model

CONFIG = ModelConfig(
    stop_gradient=True,
    loss_correction="negative_transfer_gap",
    mutual_information=True,
    time_knots=7,
    dim=6,
    max_length=5,
    experts=3,
    cross_experts=1,
    ffn_dim=4,
)
SPAN = (100.0, 700.0)


def grown(model, old_of_D, spans=(SPAN, SPAN), knots=7):
    return grow_state(model.state_dict(), old_of_D, spans, knots)


def test_the_same_domains_are_the_same_model():
    model = make_model(CONFIG, 3, seed=1, lambda_state=True)
    state = grown(model, [0, 1, 2])
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_domains_keep_what_is_theirs_wherever_they_stand_and_new_ones_begin_as_the_mean():
    model = make_model(CONFIG, 3, seed=2, lambda_state=True)
    model.gap.sums_2D = torch.arange(6, dtype=torch.float64).view(2, 3)
    before, after = model.state_dict(), SyNCRec(CONFIG, 4).double()
    after.load_state_dict(
        grown(model, [2, -1, 0, 1])
    )  # all names and shapes fit
    for part in ("single_gates", "single_towers"):
        for (name, own), others in zip(
            getattr(after, part)[1].named_parameters(),
            zip(
                *(getattr(model, part)[d].parameters() for d in range(3)),
                strict=True,
            ),
            strict=True,
        ):
            torch.testing.assert_close(
                own, torch.stack(others).mean(0), msg=name
            )
        for new, old in ((0, 2), (2, 0), (3, 1)):
            for name, value in getattr(after, part)[new].named_parameters():
                assert torch.equal(value, before[f"{part}.{old}.{name}"])
    old_D = before["correction.lambda_D"].tolist()
    kept = [
        0.75 * value for value in (old_D[2], 0, old_D[0], old_D[1])
    ]  # a fourth is kept for the new one
    assert after.correction.lambda_D.tolist() == pytest.approx(kept, abs=2e-6)
    assert after.gap.sums_2D.tolist() == [[2, 0, 0, 1], [5, 0, 3, 4]]
    assert after.gap.single_weight_D[1] == 0.5
    for name, value in before.items():
        if not name.startswith(
            (
                "single_gates",
                "single_towers",
                "correction.lambda",
                "gap.",
                "clock.knots",
            )
        ):
            assert torch.equal(after.state_dict()[name], value), name


def test_a_mean_gap_of_earlier_versions_is_read():
    """By the name that it had, without its noise."""
    model = make_model(CONFIG, 3, seed=5, lambda_state=True)
    state = model.state_dict()
    state["prediction.gap_2D"] = state.pop("gap.sums_2D")
    del state["gap.noise_3D"]
    after = SyNCRec(CONFIG, 3).double()
    after.load_state_dict(grow_state(state, [2, -1, 0], (SPAN, SPAN), 7))
    sums_2D = model.gap.sums_2D
    assert torch.equal(after.gap.sums_2D[:, [0, 2]], sums_2D[:, [2, 0]])
    assert not after.gap.sums_2D[:, 1].any()
    assert not after.gap.noise_3D.any()


def test_a_state_of_today_without_its_noise_is_refused():
    state = make_model(CONFIG, 3, seed=5).state_dict()
    del state["gap.noise_3D"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gap\.noise_3D"):
        SyNCRec(CONFIG, 3).double().load_state_dict(state)


def test_a_domain_may_be_gone():
    model = make_model(CONFIG, 3, seed=3, lambda_state=True)
    after = SyNCRec(CONFIG, 2).double()
    after.load_state_dict(grown(model, [2, 0]))
    left_D = model.correction.lambda_D[[2, 0]]
    torch.testing.assert_close(
        after.correction.lambda_D, left_D / left_D.sum(), rtol=0, atol=2e-6
    )
    assert torch.equal(
        after.single_gates[0].weight, model.single_gates[2].weight
    )


@pytest.mark.parametrize("knots", [7, 13, 4])
def test_a_time_has_the_vector_that_it_had(knots):
    """The span has grown to twice its length, and knots lie where they lay, between them, or fewer."""
    model = make_model(CONFIG, 2, seed=4)
    new_span = (100.0, 1300.0)
    after = SyNCRec(
        ModelConfig(**{**CONFIG.__dict__, "time_knots": knots}), 2
    ).double()
    after.load_state_dict(grown(model, [0, 1], (SPAN, new_span), knots))
    for time in torch.linspace(*new_span, knots, dtype=torch.float64).tolist():
        old_tick = min(1.0, (time - SPAN[0]) / (SPAN[1] - SPAN[0])) * TICKS
        new_tick = (time - new_span[0]) / (new_span[1] - new_span[0]) * TICKS
        old, new = (
            at(each.clock, tick)
            for each, tick in ((model, old_tick), (after, new_tick))
        )
        torch.testing.assert_close(
            new, old, rtol=0, atol=2e-4
        )  # a knot may lie within a tick, whose ends are read here


def at(clock: Clock, tick):
    """The outputs' function at a time that is no whole tick."""
    low = int(tick)
    pair = clock.encode_outputs(torch.tensor([low, min(low + 1, TICKS)]))
    return torch.lerp(pair[0], pair[1], tick - low)


def test_without_times_or_single_domain_tasks_nothing_is_missing():
    plain = ModelConfig(
        time_knots=0,
        dim=6,
        experts=1,
        tasks="cross",
        stop_gradient=False,
        loss_correction="none",
        mutual_information=False,
    )
    model = SyNCRec(plain, 2).double()
    SyNCRec(plain, 3).double().load_state_dict(
        grown(model, [1, 0, -1], knots=0)
    )
