"""φ and λ (section 4.3)."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncrec.config import ModelConfig
from syncrec.losses.loss_correction import LossCorrection, transfer_gap
from tests.helpers.reference import EQUATIONS


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def correction(domains=3, state=None, **values):
    config = ModelConfig(**EQUATIONS | values)
    module = LossCorrection(config, domains).double()
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
    torch.testing.assert_close(
        module(phi_D, torch.ones(3, dtype=torch.bool)), expected_D
    )
    torch.testing.assert_close(module.lambda_D, expected_D)


def test_update_is_equation_11():
    state, phi_D = [0.5, 0.2, 0.3], doubles(0.4, -0.3, 0.1)
    module = correction(state=state, correction_temperature=0.7)
    module.alpha.data.fill_(1.5)
    module.beta.data.fill_(0.8)
    powers = [
        math.exp((1.5 * old + 0.8 * phi) / 0.7)
        for old, phi in zip(state, phi_D.tolist(), strict=True)
    ]
    expected = [power / sum(powers) for power in powers]
    assert module(
        phi_D, torch.ones(3, dtype=torch.bool)
    ).tolist() == pytest.approx(expected, abs=1e-12)


def test_weights_may_add_up_to_the_number_of_domains():
    """The state does not: eq. 11 goes on from it as ever."""
    one, domains = (
        correction(correction_total=total) for total in ("one", "domains")
    )
    for phi_D in (doubles(-1, 0, 2), doubles(1, 0.5, 0)):
        present_D = torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(
            domains(phi_D, present_D), 3 * one(phi_D, present_D)
        )
        torch.testing.assert_close(domains.lambda_D, one.lambda_D)


@given(
    phi=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_an_absent_domain_keeps_its_lambda_and_all_sum_to_one(
    phi, present, weights
):
    state = [weight / sum(weights) for weight in weights]
    module, present_D = correction(4, state), torch.tensor(present)
    new_D = module(doubles(*phi), present_D).detach()
    assert torch.equal(new_D[~present_D], doubles(*state)[~present_D])
    assert new_D.sum().item() == pytest.approx(1, abs=1e-12)
    assert (new_D >= 0).all()


def slow_lambda(state, phi, present, delta, alpha, beta):
    """λ after a batch of φ by domain and whether each is present, in plain Python.

    A present domain gets the floor where the softmax gives it less; then the others share what is left anew, until none
    of them gets less.
    """
    domains = len(state)
    floor = min(1e-6, 1 / domains)
    logits = [
        (alpha * old + beta * gap) / delta
        for old, gap in zip(state, phi, strict=True)
    ]
    absent = [
        old if old > 0 else 1 / domains
        for old, here in zip(state, present, strict=True)
        if not here
    ]
    share = max(1 - math.fsum(absent), floor * sum(present))
    free = [domain for domain in range(domains) if present[domain]]
    state = [
        floor if here else old for old, here in zip(state, present, strict=True)
    ]
    while free:
        rest = share - floor * (sum(present) - len(free))
        greatest = max(logits[domain] for domain in free)
        powers = {
            domain: math.exp(logits[domain] - greatest) for domain in free
        }
        shares = {
            domain: rest * power / math.fsum(powers.values())
            for domain, power in powers.items()
        }
        less = [domain for domain in free if shares[domain] < floor]
        # Where rounding alone puts all of them below, they are at the floor.
        free = [domain for domain in free if domain not in less]
        if not less:
            for domain in shares:
                state[domain] = shares[domain]
            break
    return state


@st.composite
def runs_of_batches(draw):
    domains = draw(st.integers(1, 6))
    gaps = st.lists(st.floats(-3, 3), min_size=domains, max_size=domains)
    who = st.lists(st.booleans(), min_size=domains, max_size=domains)
    return domains, draw(
        st.lists(st.tuples(gaps, who), min_size=1, max_size=12)
    )


SCALES = st.one_of(
    st.floats(-2, 2),
    st.sampled_from([0.0, 20.0, -20.0, 1e4, -1e4, 1e30, -1e30]),
)


@given(
    run=runs_of_batches(),
    delta=st.sampled_from([1e-3, 0.05, 0.1, 1.0, 1e3]),
    alpha=SCALES,
    beta=SCALES,
)
@settings(max_examples=100)
def test_any_run_of_batches_is_the_slow_loop_and_lambda_is_a_share_of_its_total(
    run, delta, alpha, beta
):
    domains, batches = run
    module = correction(
        domains, correction_temperature=delta, correction_total="domains"
    )
    module.alpha.data.fill_(alpha)
    module.beta.data.fill_(beta)
    seen = [False] * domains
    weight_D = torch.arange(1.0, domains + 1, dtype=torch.float64)
    for phi, present in batches:
        # From the module's own λ: a large α makes much of its last bit.
        old = module.lambda_D.tolist()
        state = slow_lambda(old, phi, present, delta, alpha, beta)
        new_D = module(doubles(*phi), torch.tensor(present))
        seen = [old or here for old, here in zip(seen, present, strict=True)]
        assert torch.equal(new_D.detach(), domains * module.lambda_D)
        assert module.lambda_D.tolist() == pytest.approx(
            state, rel=1e-6, abs=1e-12
        )
        for value, known in zip(module.lambda_D.tolist(), seen, strict=True):
            assert (
                min(1e-6, 1 / domains) * (1 - 1e-6) <= value <= 1
                if known
                else value == 0
            )
        assert new_D.sum().item() == pytest.approx(
            sum(seen), abs=1e-9
        )  # of D, the total
        module.zero_grad()
        (new_D @ weight_D).backward()
        assert module.alpha.grad.isfinite() and module.beta.grad.isfinite()


HARD = {
    "four domains, sharp": (4, [0.7] * 4, 0.1, 1, 1),
    "five domains, two of them rare": (
        5,
        [0.9, 0.9, 0.9, 0.2, 0.2],
        0.05,
        1,
        1,
    ),
    "both scales have grown": (9, [0.7] * 5 + [0.1] * 4, 1, 20, 20),
    "the first scale has grown": (9, [0.7] * 5 + [0.1] * 4, 1, 30, 1),
}


@pytest.mark.parametrize(
    ("domains", "chances", "delta", "alpha", "beta"), HARD.values(), ids=HARD
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_is_negative_or_nothing_after_many_batches(
    domains, chances, delta, alpha, beta, dtype
):
    config = ModelConfig(correction_temperature=delta, correction_total="one")
    module = LossCorrection(config, domains).to(dtype)
    module.alpha.data.fill_(alpha)
    module.beta.data.fill_(beta)
    generator = torch.Generator().manual_seed(1)
    seen_D = torch.zeros(domains, dtype=torch.bool)
    for _ in range(300):
        phi_D = (
            2 * torch.rand(domains, generator=generator, dtype=torch.float64)
            - 1
        )
        present_D = torch.rand(domains, generator=generator) < torch.tensor(
            chances
        )
        new_D = module(phi_D, present_D).detach()
        seen_D = seen_D | present_D
        assert (new_D[present_D] >= 0.999e-6).all() and (new_D <= 1).all()
        assert new_D.double().sum().item() == pytest.approx(
            seen_D.sum().item() / domains, abs=1e-6
        )


def test_gradients_are_the_slopes_beside_domains_at_the_floor():
    """The third domain would get 1e-9, the fourth holds most and is absent."""
    state, present_D = (
        [2e-5, 3e-5, 1e-6, 1 - 5.1e-5],
        torch.tensor([True, True, True, False]),
    )

    def weighted(alpha, beta):
        module = correction(4, state)
        module.alpha, module.beta = (
            torch.nn.Parameter(alpha),
            torch.nn.Parameter(beta),
        )
        module.eval()
        return module, module(doubles(0.3, -0.4, -20, 1), present_D) @ doubles(
            1e6, 2e6, 3e6, 4
        )

    module, value = weighted(doubles(5.0), doubles(1.0))
    value.backward()
    step = 1e-5
    for name, ends in {
        "alpha": [
            (doubles(5.0 + sign * step), doubles(1.0)) for sign in (1, -1)
        ],
        "beta": [
            (doubles(5.0), doubles(1.0 + sign * step)) for sign in (1, -1)
        ],
    }.items():
        high, low = (weighted(*end)[1].item() for end in ends)
        slope = getattr(module, name).grad.item()
        assert slope != 0 and slope == pytest.approx(
            (high - low) / (2 * step), rel=1e-4
        )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (
            [0.2, 0.0, 0.5],
            [0.4 / 2.1, 0, 1 / 2.1],
        ),  # the second was never seen: a third is kept for it
        ([-0.5, 0.9, 0.6], [1e-6, 0.6, 0.4]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1.0, 1e-12, 1e-12], [1, 1e-6, 1e-6]),
    ],
)
def test_a_state_from_before_is_gone_on_with(before, after):
    """Earlier versions could leave λ that are negative or do not add up; what is sound stays to the bit."""
    module = correction()
    module.load_state_dict(
        correction().state_dict() | {"lambda_D": doubles(*before)}
    )
    assert module.lambda_D.tolist() == pytest.approx(after, abs=4e-6)
    assert before != after or module.lambda_D.tolist() == before
    seen = sum(value != 0 for value in before)
    assert module.lambda_D.sum().item() == pytest.approx(seen / 3, abs=1e-12)
    for present in (
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ):
        new_D = module(doubles(1, 0, -1), torch.tensor(present)).detach()
        assert (new_D >= 0).all() and (new_D <= 1).all()
    assert new_D.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_domain_never_seen_stays_at_zero_until_it_comes():
    module = correction()
    first_D = module(
        doubles(1, 0, 0), torch.tensor([True, True, False])
    ).detach()
    assert first_D[2] == 0 and first_D.sum().item() == pytest.approx(
        2 / 3, abs=1e-12
    )  # its third is kept for it
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
    new = [
        correction(state=[0.2, 0.5, 0.3])(doubles(1, value, 0), present_D)
        for value in (0.0, 1e9, math.nan)
    ]
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
    (
        module(phi_D, torch.ones(3, dtype=torch.bool)) @ doubles(1, 2, 3)
    ).backward()
    assert module.alpha.grad.item() != 0 and module.beta.grad.item() != 0
    assert phi_D.grad is None and not module.lambda_D.requires_grad
    assert not any(
        parameter.requires_grad
        for parameter in correction(learn_scales=False).parameters()
    )


def test_the_state_is_saved():
    module, other = correction(state=[0.2, 0.5, 0.3]), correction()
    other.load_state_dict(module.state_dict())
    assert other.lambda_D.tolist() == [0.2, 0.5, 0.3]
