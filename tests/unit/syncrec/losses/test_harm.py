"""Harm, and what follows from it, by gaps that are made up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncrec.config import ModelConfig
from syncrec.losses.harm import GapAverage, scale_gradient

HARM = {"loss_correction": "harm"}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def average(domains=3, **values):
    return GapAverage(ModelConfig(**HARM | values), domains)


def observe(gap, means, deviation=0.05, batches=300, seed=0):
    """Batches whose gaps lie about their means."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        drawn_D = torch.randn(
            len(means), generator=generator, dtype=torch.float64
        )
        gap_D = doubles(*means) + deviation * drawn_D
        gap.observe(gap_D, torch.ones(len(means), dtype=torch.bool))


def test_the_gap_is_a_mean_that_forgets():
    gap = average(2, prediction_temperature=0.2)
    gaps = [0.3, -0.5, 0.1, 0.9]
    for value in gaps:
        gap.observe(doubles(value, 7), torch.tensor([True, False]))
    weights = [0.99 ** (len(gaps) - 1 - place) for place in range(len(gaps))]
    mean = sum(
        weight * value for weight, value in zip(weights, gaps, strict=True)
    ) / sum(weights)
    assert gap.single_weight_D.tolist() == pytest.approx(
        [1 / (1 + math.exp(mean / 0.2)), 0.5]
    )
    for _ in range(1000):
        gap.observe(doubles(-2, 7), torch.tensor([True, False]))
    assert gap.single_weight_D[0] > 0.9999


def test_the_standard_error_is_that_of_a_mean_over_two_hundred_batches():
    """Of batches that weigh less with age, Σ w² / (Σ w)² is (1 − 0.99) / (1 + 0.99)."""
    gap = average(1)
    observe(gap, [0.2], deviation=0.4, batches=5000)
    expected = 0.4 * math.sqrt(0.01 / 1.99)
    assert gap.standard_error_D.item() == pytest.approx(expected, rel=0.2)


def test_the_harmed_domain_alone_is_corrected():
    gap = average()
    observe(gap, [0.2, 0.0, -0.3])
    assert gap.unharmed_D.tolist()[:2] == [1, 1]
    assert gap.lambda_D.tolist()[:2] == [1, 1]
    harm = gap.harm_D[2].item()
    assert 0.2 < harm < 0.3
    assert gap.unharmed_D[2].item() == pytest.approx(math.exp(-harm / 0.1))
    assert 0.1 < gap.lambda_D[2] < 0.25


def test_a_smaller_gain_is_no_harm():
    """A softmax over these gaps takes weight from the first domain."""
    gap = average(2)
    observe(gap, [0.01, 2.0], deviation=0.2)
    assert gap.lambda_D.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_no_harm(seed):
    """A mean gap of 0: seldom more than three standard errors below it, and then by little."""
    gap = average(20)
    observe(gap, [0.0] * 20, deviation=0.3, seed=seed)
    assert (gap.lambda_D == 1).sum() >= 19
    assert gap.lambda_D.min() > 0.9


def test_what_ten_batches_do_not_show_is_not_believed():
    gap = average(1)
    observe(gap, [-3.0], batches=10)
    assert gap.harm_D.item() == 0
    observe(gap, [-3.0], batches=2)
    assert gap.harm_D.item() > 2


def test_the_correction_ends_with_the_harm():
    gap = average(1)
    observe(gap, [-0.5], batches=400)
    assert gap.lambda_D.item() < 0.15
    weights = []
    for seed in range(12):
        observe(gap, [0.3], batches=25, seed=seed)
        weights.append(gap.lambda_D.item())
    assert weights == sorted(weights) and weights[-1] == 1


def test_an_absent_domain_keeps_what_it_has():
    gap = average(2)
    observe(gap, [-0.5, -0.5])
    before = gap.lambda_D.clone()
    for _ in range(50):
        gap.observe(doubles(0.7, 0.7), torch.tensor([True, False]))
    assert gap.lambda_D[0] > before[0]
    assert gap.lambda_D[1] == before[1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-50, 50), min_size=3, max_size=3),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.01, 10),
)
def test_every_weight_is_within_its_bounds(batches, temperature):
    gap = average(harm_temperature=temperature)
    present_D = torch.tensor([True, True, False])
    for values in batches:
        gap.observe(doubles(*values), present_D)
    for low, weight_D in (
        (0, gap.unharmed_D),
        (0.1, gap.lambda_D),
        (0, gap.single_weight_D),
    ):
        assert ((weight_D >= low) & (weight_D <= 1)).all()
    assert gap.lambda_D[2] == 1 and gap.single_weight_D[2] == 0.5


def test_the_state_is_saved_in_float64_and_leads_to_the_same():
    gap, other = average().float(), average()
    assert GapAverage(ModelConfig(), 3).sums_2D.dtype == torch.float64
    observe(gap, [0.1, -0.1, -0.9])
    other.load_state_dict(gap.state_dict())
    assert other.lambda_D.tolist() == pytest.approx(gap.lambda_D.tolist())


def test_a_mean_whose_noise_begins_anew_finds_no_harm_before_ten_batches():
    """As one of an earlier version does (tests/unit/syncrec/test_warm_start.py)."""
    gap = average(1)
    sums_2D = doubles([-0.4], [0.8])
    noise_3D = doubles([0.0], [0.0], [0.0])
    gap.load_state_dict({"sums_2D": sums_2D, "noise_3D": noise_3D})
    assert gap.mean_D.item() == -0.5 and gap.harm_D.item() == 0
    observe(gap, [-0.5], batches=20)
    assert gap.harm_D.item() > 0.3


def test_a_gate_scales_the_gradient_and_not_the_values():
    output_KMR = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gate_M = doubles(1, 0.25, 0)
    scaled_KMR = scale_gradient(output_KMR, gate_M)
    assert torch.equal(scaled_KMR, output_KMR)
    gradient_KMR = torch.randn(2, 3, 4, dtype=torch.float64)
    scaled_KMR.backward(gradient_KMR)
    expected_KMR = gradient_KMR * gate_M.view(1, 3, 1)
    assert torch.equal(output_KMR.grad, expected_KMR)
