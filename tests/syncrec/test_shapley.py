"""Shapley values by their definition, and the worth of coalitions by passes of their own."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from syncrec.shapley import ShapleyCorrection, coalitions, domain_of_inputs, shapley_values
from tests.syncrec.histories import draw, pack
from tests.syncrec.test_model import DOMAIN_ITEMS, make_model, make_table

D = len(DOMAIN_ITEMS)
CONFIG = ModelConfig(dim=6, max_length=5, experts=2, cross_experts=1, dropout=0.3, loss_correction="shapley")


@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.floats(-5, 5), min_size=2**d, max_size=2**d)))
def test_values_are_mean_marginal_contributions_over_all_orders(worth):
    domains = int(math.log2(len(worth)))
    orders = list(itertools.permutations(range(domains)))
    expected = [0.0] * domains
    for order in orders:
        members = 0
        for domain in order:
            expected[domain] += (worth[members | 1 << domain] - worth[members]) / len(orders)
            members |= 1 << domain
    found = shapley_values(torch.tensor(worth, dtype=torch.float64), domains)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found.sum().item() == pytest.approx(worth[-1] - worth[0], abs=1e-9)


@pytest.mark.parametrize("tasks", ["both", "cross"])
def test_lambda_is_the_softmax_of_what_domains_contribute_to_the_loss(tasks):
    """The worth of a coalition is the cross-domain loss of a model without dropout whose other items are zeros."""
    alone = {"stop_gradient": "off", "mutual_information": "off"} if tasks == "cross" else {}
    config = replace(CONFIG, tasks=tasks, **alone)
    batch, table = pack(draw(3, DOMAIN_ITEMS), DOMAIN_ITEMS, 5)[0], make_table(DOMAIN_ITEMS, 6, seed=2)
    model, domain_N = make_model(config, D, seed=1), domain_of_inputs(batch, D)
    rows = table[batch.ids].requires_grad_()
    model.train()
    torch.manual_seed(4)
    _, report = model(batch, rows)
    drawn = torch.rand(1)
    without = make_model(replace(config, loss_correction="none"), D, seed=1)
    without.train()
    torch.manual_seed(4)
    without(batch, rows)
    assert torch.equal(drawn, torch.rand(1))  # the step's own draws are as they would be
    model.eval()
    worth = []
    for member_D in coalitions(D):
        outputs = model._cross_outputs(batch.cross, rows[: batch.interactions] * member_D[domain_N].unsqueeze(1))
        inputs, negatives = rows[: batch.interactions], rows[batch.interactions :]
        loss_L = model._prediction_losses(batch, batch.cross, inputs, negatives, outputs)
        weight_L = batch.cross.target_weight_L
        worth.append(-(loss_L * weight_L).sum() / weight_L.sum())
    present_D = torch.bincount(batch.cross.target_domain_L, batch.cross.target_weight_L, D) > 0
    assert not present_D.all()
    values_D = shapley_values(torch.stack(worth).detach(), D)
    expected = torch.softmax(values_D.masked_fill(~present_D, -torch.inf), 0)
    torch.testing.assert_close(report.lambda_D, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.correction.lambda_D, report.lambda_D)


def test_inputs_have_their_domains():
    batch = pack(draw(5, DOMAIN_ITEMS), DOMAIN_ITEMS, 5)[0]
    starts = torch.tensor([0, *itertools.accumulate(DOMAIN_ITEMS)][:-1])
    expected = torch.searchsorted(starts, batch.ids[: batch.interactions], right=True) - 1
    inputs = batch.cross.input_M[batch.cross.input_M > 0] - 1
    assert len(inputs) and torch.equal(domain_of_inputs(batch, D)[inputs], expected[inputs])


def test_absent_domains_have_no_weight_and_all_add_up():
    correction = ShapleyCorrection(replace(CONFIG, correction_total="domains"), 3)
    weights = correction(torch.arange(8.0), torch.tensor([True, False, True]))
    assert weights[1] == 0 and weights.sum().item() == pytest.approx(3) and correction.lambda_D.sum().item() == pytest.approx(1)


def test_too_many_domains_are_refused():
    with pytest.raises(ValueError, match="2\\^D forward passes a step, 128 with 7 domains"):
        SyNCRec(CONFIG, 7)
