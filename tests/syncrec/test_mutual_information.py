"""SC-MIM (section 4.4) on vectors written down by hand, and pooling."""

import math
from types import SimpleNamespace

import pytest
import torch

from syncrec.config import ModelConfig
from syncrec.mutual_information import MutualInformation, pool

USERS, DOMAINS, WIDTH = 5, 2, 3


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(USERS, DOMAINS, WIDTH, generator=generator, dtype=torch.float64)


def module(**values):
    made = MutualInformation(ModelConfig(dim=WIDTH, **{f"mutual_information_{name}": v for name, v in values.items()}))
    made.weight.data = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    return made.double()


def present(*users_of_domains):
    table_BD = torch.zeros(USERS, DOMAINS, dtype=torch.bool)
    for domain, users in enumerate(users_of_domains):
        table_BD[users, domain] = True
    return table_BD


@pytest.mark.parametrize("denominator", ["all", "others"])
@pytest.mark.parametrize("similarity", ["sigmoid", "cosine"])
def test_sums_are_equation_16_over_the_users_that_are_present(denominator, similarity):
    """The single-domain side of every user is a candidate, the cross-domain side asks (eq. 16, 17)."""
    mutual = module(denominator=denominator, similarity=similarity, temperature=0.5)
    single_BDR, cross_BDR = vectors(1), vectors(2)
    users_of = ([0, 2, 3], [1, 4])

    def rho(u, v):
        v = mutual.weight @ v
        raw = torch.sigmoid(u @ v) if similarity == "sigmoid" else u @ v / u.norm() / v.norm()
        return raw.item() / 0.5

    expected = []
    for domain, users in enumerate(users_of):
        total = 0.0
        for user in users:
            cross = cross_BDR[user, domain]
            candidates = [other for other in users if denominator == "all" or other != user]
            powers = [math.exp(rho(single_BDR[other, domain], cross)) for other in candidates]
            total += rho(single_BDR[user, domain], cross) - math.log(sum(powers))
        expected.append(total)
    here_BD = present(*users_of)
    sums_D, counts_D = mutual(cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS))
    assert sums_D.tolist() == pytest.approx(expected, abs=1e-12)
    assert counts_D.tolist() == [3, 2]


def test_ranks_sum_up_to_one_process():
    """Each rank asks for its own users among the candidates of all; the counts are everybody's."""
    mutual, here_BD = module(), present([0, 1, 2, 4], [3, 4])
    single_BDR, cross_BDR = vectors(1), vectors(2)
    whole_D, count_D = mutual(cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS))
    parts = []
    for own_B in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):
        part_D, part_count_D = mutual(cross_BDR[own_B], single_BDR, here_BD[own_B], here_BD, own_B)
        assert torch.equal(part_count_D, count_D)
        parts.append(part_D)
    torch.testing.assert_close(parts[0] + parts[1], whole_D)


@pytest.mark.parametrize("denominator", ["all", "others"])
@pytest.mark.parametrize("users_of", [([2], [0, 1]), ([], [0, 1])])
def test_a_user_without_company_counts_nothing_and_has_no_gradient(denominator, users_of):
    mutual, here_BD = module(denominator=denominator), present(*users_of)
    single_BDR, cross_BDR = vectors(1).requires_grad_(), vectors(2).requires_grad_()
    sums_D, counts_D = mutual(cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS))
    assert sums_D[0] == 0 and counts_D.tolist() == [0, 2]
    sums_D.sum().backward()
    for gradient in (single_BDR.grad, cross_BDR.grad):
        assert gradient.isfinite().all()
        assert torch.equal(gradient.abs().sum(2) > 0, present([], [0, 1]))


def test_users_that_are_absent_are_no_candidates():
    mutual, here_BD = module(), present([0, 1], [0, 1])
    single_BDR, cross_BDR = vectors(1), vectors(2)
    before, _ = mutual(cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS))
    single_BDR[2:], cross_BDR[2:] = 7.0, -3.0
    after, _ = mutual(cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS))
    assert torch.equal(before, after)


def test_with_all_candidates_the_bound_is_a_log_probability():
    """Own user among the candidates: at most 0, and 0 is reached by a view that tells users apart."""
    mutual = module(similarity="cosine", temperature=0.01)
    mutual.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    apart_BDR = torch.eye(WIDTH, dtype=torch.float64).unsqueeze(1).expand(-1, DOMAINS, -1)
    here_BD = torch.ones(WIDTH, DOMAINS, dtype=torch.bool)
    sums_D, _ = mutual(apart_BDR, apart_BDR, here_BD, here_BD, torch.arange(WIDTH))
    assert (sums_D <= 0).all() and sums_D.abs().max() < 1e-12
    swapped_D, _ = mutual(apart_BDR.flip(0), apart_BDR, here_BD, here_BD, torch.arange(WIDTH))
    assert (swapped_D < -100).all()


def test_pooling_is_the_mean_of_a_slots_tokens():
    output_MR = torch.arange(12, dtype=torch.float64).view(4, 3)
    view = SimpleNamespace(pool_token=torch.tensor([3, 1, 2]), pool_slot=torch.tensor([5, 5, 0]))
    mean_BDR, count_BD = pool(output_MR, view, users=3, domains=2)
    assert count_BD.tolist() == [[1, 0], [0, 0], [0, 2]]
    assert mean_BDR[2, 1].tolist() == [6.0, 7.0, 8.0]
    assert mean_BDR[0, 0].tolist() == [6.0, 7.0, 8.0]
    assert not mean_BDR[1].any() and not mean_BDR[0, 1].any()
