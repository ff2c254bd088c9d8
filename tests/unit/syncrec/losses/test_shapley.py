"""CGRec's λ: against every order of the players, and what it leaves alone. The whole step: test_model.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncrec.config import ModelConfig
from syncrec.losses.shapley import (
    MOST_DOMAINS,
    ShapleyCorrection,
    shapley_values,
)
from syncrec.model import SyNCRec
from tests.helpers.histories import draw, pack
from tests.helpers.reference import EQUATIONS, shapley
from tests.unit.syncrec.test_model import (
    DOMAIN_ITEMS,
    SMALL,
    make_model,
    make_table,
    near,
    run,
)
from tests.unit.syncrec.test_sasrec import SASREC

SHAPLEY = replace(SMALL, loss_correction="shapley", correction_temperature=0.1)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def correction(domains=3, state=None, **values):
    module = ShapleyCorrection(
        ModelConfig(**EQUATIONS | {"loss_correction": "shapley"} | values),
        domains,
    ).double()
    if state is not None:
        module.lambda_D = doubles(*state)
    return module


@given(
    st.integers(1, 5).flatmap(
        lambda players: st.lists(
            st.floats(-9, 9), min_size=2**players, max_size=2**players
        )
    )
)
def test_values_are_the_mean_gains_over_every_order(worths):
    players = int(math.log2(len(worths)))
    expected = shapley(
        lambda coalition: worths[sum(1 << player for player in coalition)],
        players,
    )
    values_D = shapley_values(doubles(*worths))
    assert values_D.tolist() == pytest.approx(expected, abs=1e-12)
    assert values_D.sum().item() == pytest.approx(
        worths[-1] - worths[0], abs=1e-12
    )  # efficiency


def test_who_helps_gets_the_greater_weight():
    """Coalition c holds the domains whose bits are set: the first domain's items take 1 off the loss, the last one's add 1."""
    loss_C = doubles(*(4 - (c & 1) + (c >> 2 & 1) for c in range(8)))
    lambda_D = correction(correction_temperature=0.5)(
        loss_C, torch.ones(3, dtype=torch.bool)
    )
    torch.testing.assert_close(
        lambda_D, torch.softmax(doubles(1, 0, -1) / 0.5, dim=0)
    )


def test_present_domains_share_one_and_an_absent_one_keeps_its_lambda():
    module = correction(state=[0.2, 0.5, 0.3])
    lambda_D = module(
        doubles(*range(8, 0, -1)), torch.tensor([True, False, True])
    )
    assert (
        lambda_D[[0, 2]].sum().item() == pytest.approx(1) and lambda_D[1] == 0.5
    )
    assert torch.equal(module.lambda_D, lambda_D)
    assert torch.equal(
        module(doubles(*[0.0] * 8), torch.zeros(3, dtype=torch.bool)), lambda_D
    )  # nothing seen


def test_evaluation_keeps_the_state_and_it_is_saved():
    module, other = correction(state=[0.2, 0.5, 0.3]).eval(), correction()
    module(doubles(*range(8)), torch.ones(3, dtype=torch.bool))
    assert module.lambda_D.tolist() == [0.2, 0.5, 0.3]
    other.load_state_dict(module.state_dict())
    assert other.lambda_D.tolist() == [0.2, 0.5, 0.3]


def test_a_loss_that_is_no_number_is_not_hidden():
    assert (
        correction()(
            doubles(*[1.0] * 7, math.nan), torch.ones(3, dtype=torch.bool)
        )
        .isnan()
        .all()
    )


@pytest.mark.parametrize("tasks", ["both", "cross"])
def test_the_coalition_of_all_is_the_real_pass_and_an_input_matters_where_it_is_shown(
    tasks,
):
    """And λ follows from the losses of all coalitions."""
    config = (
        SHAPLEY
        if tasks == "both"
        else replace(
            SASREC,
            loss_correction="shapley",
            correction_temperature=0.1,
            correction_total="one",
        )
    )
    model, table = (
        make_model(config, 4, seed=41),
        make_table(DOMAIN_ITEMS, config.dim, 41),
    )
    batch, _ = pack(draw(41, DOMAIN_ITEMS), DOMAIN_ITEMS, config.max_length)
    given = []
    model.correction.register_forward_pre_hook(
        lambda module, inputs: given.append(inputs)
    )
    _, report, _, _ = run(model, table, batch)
    (loss_C, present_D) = given[0]
    assert (
        len(loss_C) == 16
        and loss_C.dtype == torch.float64
        and loss_C.unique().numel() > 8
    )
    mean = (
        report.cross_D.nan_to_num() * report.cross_targets_D
    ).sum() / report.cross_targets_D.sum()
    near(loss_C[-1], mean, "loss with all items")
    near(
        report.lambda_D,
        torch.softmax(shapley_values(-loss_C) / 0.1, dim=0),
        "λ",
    )
    assert (
        report.lambda_D.max() > 1.1 * report.lambda_D.min() and present_D.all()
    )
    # What is an input alone, and no target, does not matter to the coalition of none.
    spoiled, rows = [], table[batch.ids].clone()
    targets = batch.cross.target_interaction_L.unique()
    others = torch.ones(batch.interactions, dtype=torch.bool)
    others[targets] = False
    rows[: batch.interactions][others] += 1.0
    model.correction.register_forward_pre_hook(
        lambda module, inputs: spoiled.append(inputs[0])
    )
    model(batch, rows)
    assert (
        others.any()
        and spoiled[0][0] == loss_C[0]
        and spoiled[0][-1] != loss_C[-1]
    )
    assert report.phi_D.isnan().all() == (tasks == "cross")


def test_the_real_pass_and_the_random_state_are_as_without():
    """Dropout on: the same masks, so the same uncorrected losses; λ itself draws nothing."""
    batch, _ = pack(draw(42, DOMAIN_ITEMS), DOMAIN_ITEMS, SMALL.max_length)
    table = make_table(DOMAIN_ITEMS, SMALL.dim, 42)
    results, states = [], []
    for loss_correction in ("shapley", "none"):
        model = make_model(
            replace(SHAPLEY, dropout=0.4, loss_correction=loss_correction),
            4,
            seed=42,
        )
        torch.manual_seed(0)
        results.append(run(model, table, batch)[1])
        states.append(torch.get_rng_state())
        assert all(part.training for part in model.modules())
    assert torch.equal(*states)
    assert torch.equal(results[0].cross_D, results[1].cross_D) and torch.equal(
        results[0].single_D, results[1].single_D
    )
    sharp = make_model(replace(SHAPLEY, dropout=0.0), 4, seed=42)
    assert torch.equal(
        run(sharp, table, batch)[1].lambda_D, results[0].lambda_D
    )


def test_too_many_domains_are_refused_with_the_reason():
    with pytest.raises(
        ValueError,
        match=r"^model\.loss_correction is shapley: with 7 domains it takes 128 more [^\n]*$",
    ):
        SyNCRec(SHAPLEY, MOST_DOMAINS + 1)
    SyNCRec(SHAPLEY, MOST_DOMAINS)
