"""φ and λ (section 4.3)."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncrec.config import ModelConfig
from syncrec.transfer import LossCorrection, PredictionMix, transfer_gap


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def correction(domains=3, state=None, **values):
    module = LossCorrection(ModelConfig(**values), domains).double()
    if state is not None:
        module.lambda_D = doubles(*state)
    return module


def test_the_gap_is_negative_where_other_domains_harm():
    """Single-domain loss 1 and cross-domain loss 3 a target: harm. Sums over 2, 4 and no targets."""
    gap_D = transfer_gap(doubles(2, 12, 0), doubles(6, 4, 0), doubles(2, 4, 0))
    assert gap_D.tolist() == [-2.0, 2.0, 0.0]


def test_first_update_is_the_softmax_of_phi():
    module, phi_D = correction(correction_temperature=0.5), doubles(-1, 0, 2)
    expected_D = torch.softmax(phi_D / 0.5, dim=0)
    torch.testing.assert_close(module(phi_D, torch.ones(3, dtype=torch.bool)), expected_D)
    torch.testing.assert_close(module.lambda_D, expected_D)


def test_update_is_equation_11():
    state, phi_D = [0.5, 0.2, 0.3], doubles(0.4, -0.3, 0.1)
    module = correction(state=state, correction_temperature=0.7)
    module.alpha.data.fill_(1.5)
    module.beta.data.fill_(0.8)
    powers = [math.exp((1.5 * old + 0.8 * phi) / 0.7) for old, phi in zip(state, phi_D.tolist(), strict=True)]
    expected = [power / sum(powers) for power in powers]
    assert module(phi_D, torch.ones(3, dtype=torch.bool)).tolist() == pytest.approx(expected, abs=1e-12)


def test_weights_may_add_up_to_the_number_of_domains():
    """The state does not: eq. 11 goes on from it as ever."""
    one, domains = (correction(correction_total=total) for total in ("one", "domains"))
    for phi_D in (doubles(-1, 0, 2), doubles(1, 0.5, 0)):
        present_D = torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(domains(phi_D, present_D), 3 * one(phi_D, present_D))
        torch.testing.assert_close(domains.lambda_D, one.lambda_D)


@given(
    phi=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_an_absent_domain_keeps_its_lambda_and_all_sum_to_one(phi, present, weights):
    state = [weight / sum(weights) for weight in weights]
    module, present_D = correction(4, state), torch.tensor(present)
    new_D = module(doubles(*phi), present_D).detach()
    assert torch.equal(new_D[~present_D], doubles(*state)[~present_D])
    assert new_D.sum().item() == pytest.approx(1, abs=1e-12)
    assert (new_D >= 0).all()


def test_a_domain_never_seen_stays_at_zero_until_it_comes():
    module = correction()
    first_D = module(doubles(1, 0, 0), torch.tensor([True, True, False])).detach()
    assert first_D[2] == 0 and first_D.sum().item() == pytest.approx(2 / 3, abs=1e-12)  # its third is kept for it
    assert module(doubles(1, 0, 0), torch.ones(3, dtype=torch.bool))[2] > 0


def test_a_domain_that_comes_later_finds_its_share():
    """Batch 1 has the first domain only, batch 2 the second only: neither takes what belongs to the other."""
    module = correction(domains=2)
    module(doubles(0.3, 0), torch.tensor([True, False]))
    assert module.lambda_D.tolist() == pytest.approx([0.5, 0])
    module(doubles(0, -0.4), torch.tensor([False, True]))
    assert module.lambda_D.tolist() == pytest.approx([0.5, 0.5])


def test_phi_of_an_absent_domain_is_not_looked_at():
    present_D = torch.tensor([True, False, True])
    new = [correction(state=[0.2, 0.5, 0.3])(doubles(1, value, 0), present_D) for value in (0.0, 1e9, math.nan)]
    assert torch.equal(new[0], new[1]) and torch.equal(new[0], new[2])


def test_no_domain_present_changes_nothing_and_gives_no_bad_gradient():
    module = correction(state=[0.2, 0.5, 0.3])
    new_D = module(doubles(0, 0, 0), torch.zeros(3, dtype=torch.bool))
    assert new_D.tolist() == [0.2, 0.5, 0.3]
    new_D.sum().backward()
    assert module.alpha.grad.item() == 0 and module.beta.grad.item() == 0


def test_equal_inputs_give_equal_bits():
    """What keeps λ equal on ranks that were given the same sums."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        phi_D = torch.randn(6, generator=generator, dtype=torch.float64)
        present_D = torch.rand(6, generator=generator) > 0.3
        module = LossCorrection(ModelConfig(), 6)
        twin = copy.deepcopy(module)
        for _ in range(3):
            assert torch.equal(module(phi_D, present_D), twin(phi_D, present_D))
            assert torch.equal(module.lambda_D, twin.lambda_D)


def test_evaluation_gives_lambda_but_keeps_the_state():
    module = correction(state=[0.2, 0.5, 0.3])
    phi_D, present_D = doubles(1, 0, -1), torch.ones(3, dtype=torch.bool)
    module.eval()
    new_D = module(phi_D, present_D)
    assert module.lambda_D.tolist() == [0.2, 0.5, 0.3]
    module.train()
    assert torch.equal(module(phi_D, present_D), new_D)
    assert torch.equal(module.lambda_D, new_D.detach())


def test_gradients_reach_the_scales_only():
    module = correction(state=[0.2, 0.5, 0.3])
    phi_D = doubles(1, 0, -1).requires_grad_()
    (module(phi_D, torch.ones(3, dtype=torch.bool)) @ doubles(1, 2, 3)).backward()
    assert module.alpha.grad.item() != 0 and module.beta.grad.item() != 0
    assert phi_D.grad is None and not module.lambda_D.requires_grad
    assert not any(parameter.requires_grad for parameter in correction(learn_scales=False).parameters())


def test_the_state_is_saved():
    module, other = correction(state=[0.2, 0.5, 0.3]), correction()
    other.load_state_dict(module.state_dict())
    assert other.lambda_D.tolist() == [0.2, 0.5, 0.3]


def test_the_gap_for_a_prediction_is_a_mean_that_forgets():
    mix = PredictionMix(ModelConfig(prediction_temperature=0.2), 2).double()
    gaps = [0.3, -0.5, 0.1, 0.9]
    for gap in gaps:
        mix.observe(doubles(gap, 7), torch.tensor([True, False]))
    weights = [0.99 ** (len(gaps) - 1 - place) for place in range(len(gaps))]
    mean = sum(weight * gap for weight, gap in zip(weights, gaps, strict=True)) / sum(weights)
    assert mix.own_D.tolist() == pytest.approx([1 / (1 + math.exp(mean / 0.2)), 0.5])
    for _ in range(1000):
        mix.observe(doubles(-2, 7), torch.tensor([True, False]))
    assert mix.own_D[0] > 0.9999
