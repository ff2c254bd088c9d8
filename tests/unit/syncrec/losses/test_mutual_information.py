"""SC-MIM (section 4.4) on vectors written down by hand, and pooling."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.mutual_information import (
    against_all,
    against_sample,
    peak_bytes,
)
from syncrec.config import ModelConfig
from syncrec.losses import mutual_information
from syncrec.losses.mutual_information import MutualInformation, Sample, pool

USERS, DOMAINS, WIDTH = 5, 2, 3


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        USERS, DOMAINS, WIDTH, generator=generator, dtype=torch.float64
    )


def module(**values):
    made = MutualInformation(
        ModelConfig(
            dim=WIDTH,
            **{f"mutual_information_{name}": v for name, v in values.items()},
        )
    )
    made.weight.data = torch.randn(
        WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)
    )
    return made.double()


def present(*users_of_domains):
    table_BD = torch.zeros(USERS, DOMAINS, dtype=torch.bool)
    for domain, users in enumerate(users_of_domains):
        table_BD[users, domain] = True
    return table_BD


@pytest.mark.parametrize("denominator", ["all", "others"])
@pytest.mark.parametrize("similarity", ["sigmoid", "cosine"])
def test_sums_are_equation_16_over_the_users_that_are_present(
    denominator, similarity
):
    """The single-domain side of every user is a candidate, the cross-domain side asks (eq. 16, 17)."""
    mutual = module(
        denominator=denominator, similarity=similarity, temperature=0.5
    )
    single_BDR, cross_BDR = vectors(1), vectors(2)
    users_of = ([0, 2, 3], [1, 4])

    def rho(u, v):
        v = mutual.weight @ v
        raw = (
            torch.sigmoid(u @ v)
            if similarity == "sigmoid"
            else u @ v / u.norm() / v.norm()
        )
        return raw.item() / 0.5

    expected = []
    for domain, users in enumerate(users_of):
        total = 0.0
        for user in users:
            cross = cross_BDR[user, domain]
            candidates = [
                other
                for other in users
                if denominator == "all" or other != user
            ]
            powers = [
                math.exp(rho(single_BDR[other, domain], cross))
                for other in candidates
            ]
            total += rho(single_BDR[user, domain], cross) - math.log(
                sum(powers)
            )
        expected.append(total)
    here_BD = present(*users_of)
    sums_D, counts_D = mutual(
        cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS)
    )
    assert sums_D.tolist() == pytest.approx(expected, abs=1e-12)
    assert counts_D.tolist() == [3, 2]


def test_ranks_sum_up_to_one_process():
    """Each rank asks for its own users among the candidates of all; the counts are everybody's."""
    mutual, here_BD = module(), present([0, 1, 2, 4], [3, 4])
    single_BDR, cross_BDR = vectors(1), vectors(2)
    whole_D, count_D = mutual(
        cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS)
    )
    parts = []
    for own_B in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):
        part_D, part_count_D = mutual(
            cross_BDR[own_B], single_BDR, here_BD[own_B], here_BD, own_B
        )
        assert torch.equal(part_count_D, count_D)
        parts.append(part_D)
    torch.testing.assert_close(parts[0] + parts[1], whole_D)


@pytest.mark.parametrize("denominator", ["all", "others"])
@pytest.mark.parametrize("users_of", [([2], [0, 1]), ([], [0, 1])])
def test_a_user_without_company_counts_nothing_and_has_no_gradient(
    denominator, users_of
):
    mutual, here_BD = module(denominator=denominator), present(*users_of)
    single_BDR, cross_BDR = (
        vectors(1).requires_grad_(),
        vectors(2).requires_grad_(),
    )
    sums_D, counts_D = mutual(
        cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS)
    )
    assert sums_D[0] == 0 and counts_D.tolist() == [0, 2]
    sums_D.sum().backward()
    for gradient in (single_BDR.grad, cross_BDR.grad):
        assert gradient.isfinite().all()
        assert torch.equal(gradient.abs().sum(2) > 0, present([], [0, 1]))


def test_users_that_are_absent_are_no_candidates():
    mutual, here_BD = module(), present([0, 1], [0, 1])
    single_BDR, cross_BDR = vectors(1), vectors(2)
    before, _ = mutual(
        cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS)
    )
    single_BDR[2:], cross_BDR[2:] = 7.0, -3.0
    after, _ = mutual(
        cross_BDR, single_BDR, here_BD, here_BD, torch.arange(USERS)
    )
    assert torch.equal(before, after)


def test_with_all_candidates_the_bound_is_a_log_probability():
    """Own user among the candidates: at most 0, and 0 is reached by a view that tells users apart."""
    mutual = module(similarity="cosine", temperature=0.01)
    mutual.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    apart_BDR = (
        torch.eye(WIDTH, dtype=torch.float64)
        .unsqueeze(1)
        .expand(-1, DOMAINS, -1)
    )
    here_BD = torch.ones(WIDTH, DOMAINS, dtype=torch.bool)
    sums_D, _ = mutual(
        apart_BDR, apart_BDR, here_BD, here_BD, torch.arange(WIDTH)
    )
    assert (sums_D <= 0).all() and sums_D.abs().max() < 1e-12
    swapped_D, _ = mutual(
        apart_BDR.flip(0), apart_BDR, here_BD, here_BD, torch.arange(WIDTH)
    )
    assert (swapped_D < -100).all()


def dense_sums(mutual, cross_BDR, single_GDR, present_BD, present_GD, own_B):
    """The bounds' sums with all similarities at once, as one would write eq. 16 down."""
    projected_BDR = cross_BDR @ mutual.weight.T
    if mutual.similarity == "cosine":
        normal_BDR, normal_GDR = (
            x / x.norm(dim=-1, keepdim=True)
            for x in (projected_BDR, single_GDR)
        )
        rho_DBG = (
            torch.einsum("bdr,gdr->dbg", normal_BDR, normal_GDR)
            / mutual.temperature
        )
    else:
        rho_DBG = (
            torch.sigmoid(
                torch.einsum("bdr,gdr->dbg", projected_BDR, single_GDR)
            )
            / mutual.temperature
        )
    sums = []
    for domain, rho_BG in enumerate(rho_DBG):
        total = rho_BG.new_zeros(())
        for user, own in enumerate(own_B.tolist()):
            candidates = present_GD[:, domain].clone()
            if not present_BD[user, domain] or candidates.sum() < 2:
                continue
            candidates[own] = not mutual.others_only
            total = (
                total
                + rho_BG[user, own]
                - rho_BG[user, candidates].logsumexp(0)
            )
        sums.append(total)
    return torch.stack(sums)


def gradients_of(function, mutual, *views):
    """A function's sums over domains, and the gradients of their weighted sum: of the views and of W."""
    leaves = [view.clone().requires_grad_() for view in views]
    mutual.weight.grad = None
    sums_D = function(*leaves)
    (
        sums_D * torch.arange(1.0, len(sums_D) + 1, dtype=sums_D.dtype)
    ).sum().backward()
    return [
        sums_D.detach(),
        mutual.weight.grad,
        *(leaf.grad for leaf in leaves),
    ]


KINDS = pytest.mark.parametrize(
    ("similarity", "denominator", "temperature"),
    [
        ("sigmoid", "all", 1.0),
        ("sigmoid", "others", 0.02),
        ("cosine", "all", 0.05),
        ("cosine", "others", 0.7),
    ],
)


def many(everyone, users, first, seed=3, domains=4):
    """Views of `everyone` and who is present: all in domain 0, nobody in 1, one alone in 2, some in 3; and a rank's part."""
    generator = torch.Generator().manual_seed(seed)
    cross_BDR = torch.randn(
        users, domains, WIDTH, generator=generator, dtype=torch.float64
    )
    single_GDR = torch.randn(
        everyone, domains, WIDTH, generator=generator, dtype=torch.float64
    )
    present_GD = torch.rand(everyone, domains, generator=generator) < 0.4
    present_GD[:, 0] = True
    present_GD[:, 1] = False
    present_GD[:, 2] = torch.arange(everyone) == first + 1
    own_B = torch.arange(first, first + users)
    return cross_BDR, single_GDR, present_GD[own_B], present_GD, own_B


@KINDS
@pytest.mark.parametrize("chunk", [1, 3, 7, 22, 23])
def test_chunks_of_candidates_give_what_all_at_once_give(
    monkeypatch, similarity, denominator, temperature, chunk
):
    """Values, and the gradients of both views and of W; 23 candidates."""
    monkeypatch.setattr(mutual_information, "_CHUNK", chunk)
    mutual = module(
        similarity=similarity, denominator=denominator, temperature=temperature
    )
    cross_BDR, single_GDR, present_BD, present_GD, own_B = many(23, 6, 9)

    def chunked(cross, single):
        return mutual(cross, single, present_BD, present_GD, own_B)[0]

    def dense(cross, single):
        return dense_sums(mutual, cross, single, present_BD, present_GD, own_B)

    expected = gradients_of(dense, mutual, cross_BDR, single_GDR)
    for part, whole in zip(
        gradients_of(chunked, mutual, cross_BDR, single_GDR),
        expected,
        strict=True,
    ):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    _, count_D = mutual(cross_BDR, single_GDR, present_BD, present_GD, own_B)
    assert count_D.tolist() == [23, 0, 0, int(present_GD[:, 3].sum())]


def test_chunks_do_not_overflow(monkeypatch):
    """In float32 at a temperature at which exp ρ has no number."""
    monkeypatch.setattr(mutual_information, "_CHUNK", 4)
    mutual = module(similarity="cosine", temperature=1e-3).float()
    given = [
        value.float() if value.is_floating_point() else value
        for value in many(23, 6, 9)
    ]
    sums_D, _ = mutual(*given)
    expected_D = dense_sums(copy.deepcopy(mutual).double(), *many(23, 6, 9))
    torch.testing.assert_close(
        sums_D.double(), expected_D, rtol=1e-3, atol=1e-3
    )


def sample_of(lists, single_GDR, present_GD, own_B, count_D, size):
    """A Sample of users (a list a domain) among the G; places that nobody takes are zeros and absent."""
    domains = len(lists)
    shown = [
        torch.cat(
            [
                single_GDR[users, d],
                single_GDR.new_zeros(size - len(users), WIDTH),
            ]
        )
        for d, users in enumerate(lists)
    ]
    present_DN = torch.zeros(domains, size, dtype=torch.bool)
    own_DB = torch.full((domains, len(own_B)), -1)
    for domain, users in enumerate(lists):
        present_DN[domain, : len(users)] = present_GD[users, domain]
        for place, user in enumerate(users):
            own_DB[domain, own_B == user] = place
    return Sample(torch.stack(shown), present_DN, own_DB, count_D)


@KINDS
@pytest.mark.parametrize("chunk", [2, 5, 100])
def test_a_sample_stands_for_all_others(
    monkeypatch, similarity, denominator, temperature, chunk
):
    """Against one user after the other: users within the sample and outside it, sampled ones that are absent."""
    monkeypatch.setattr(mutual_information, "_CHUNK", chunk)
    mutual = module(
        similarity=similarity, denominator=denominator, temperature=temperature
    )
    cross_BDR, single_GDR, present_BD, present_GD, own_B = many(23, 6, 9)
    lists = [[11, 3, 9, 20, 1], [], [10], [2, 12, 14, 0, 22, 7]]
    count_D = present_GD.sum(0)

    def sampled(cross, single):
        sample = sample_of(lists, single, present_GD, own_B, count_D, size=6)
        return mutual(
            cross,
            single[own_B],
            present_BD,
            present_BD,
            torch.arange(6),
            sample,
        )[0]

    def slow(cross, single):
        projected_BDR = cross @ mutual.weight.T

        def rho(user, other, domain):
            u, v = single[other, domain], projected_BDR[user, domain]
            raw = (
                torch.sigmoid(u @ v)
                if similarity == "sigmoid"
                else u @ v / u.norm() / v.norm()
            )
            return raw / temperature

        sums = []
        for domain, users in enumerate(lists):
            total = single.new_zeros(())
            for user, own in enumerate(own_B.tolist()):
                others = [
                    other
                    for other in users
                    if present_GD[other, domain] and other != own
                ]
                if (
                    not present_BD[user, domain]
                    or not others
                    or count_D[domain] < 2
                ):
                    continue
                positive = rho(user, own, domain)
                weight = (count_D[domain].item() - 1) / len(others)
                powers = weight * sum(
                    rho(user, other, domain).exp() for other in others
                )
                total = (
                    total
                    + positive
                    - torch.log(
                        powers + (positive.exp() if denominator == "all" else 0)
                    )
                )
            sums.append(total)
        return torch.stack(sums)

    expected = gradients_of(slow, mutual, cross_BDR, single_GDR)
    for part, whole in zip(
        gradients_of(sampled, mutual, cross_BDR, single_GDR),
        expected,
        strict=True,
    ):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(part, whole, rtol=1e-11, atol=1e-11)


@KINDS
def test_a_sample_of_all_is_exact(similarity, denominator, temperature):
    mutual = module(
        similarity=similarity, denominator=denominator, temperature=temperature
    )
    cross_BDR, single_GDR, present_BD, present_GD, own_B = many(23, 6, 9)
    lists = [
        present_GD[:, domain].nonzero().flatten().flip(0).tolist()
        for domain in range(4)
    ]
    sample = sample_of(
        lists, single_GDR, present_GD, own_B, present_GD.sum(0), size=23
    )
    whole_D, count_D = mutual(
        cross_BDR, single_GDR, present_BD, present_GD, own_B
    )
    sums_D, counts_D = mutual(
        cross_BDR,
        single_GDR[own_B],
        present_BD,
        present_BD,
        torch.arange(6),
        sample,
    )
    torch.testing.assert_close(sums_D, whole_D, rtol=1e-12, atol=1e-12)
    assert torch.equal(counts_D, count_D)


def test_memory_does_not_grow_with_the_users_of_other_ranks(monkeypatch):
    """Bytes that live at once, forward and backward. With all as candidates what grows is these, their gradients and who is
    present; with a sample nothing does."""
    monkeypatch.setattr(mutual_information, "_CHUNK", 64)
    users, domains, width = 48, 3, 8
    shape = {"dim": width, "domains": domains}
    less, more = 256, 1024
    grown = peak_bytes(against_all(users, more, **shape)) - peak_bytes(
        against_all(users, less, **shape)
    )
    a_user = domains * (4 * width + 1)
    assert (
        grown <= 3 * (more - less) * a_user
    )  # the table of all similarities: more than 4 · 48 · 3 a user
    sampled = [
        peak_bytes(against_sample(users, everyone, 128, **shape))
        for everyone in (less, more, 100 * more)
    ]
    assert len(set(sampled)) == 1


def test_pooling_is_the_mean_of_a_slots_tokens():
    output_MR = torch.arange(12, dtype=torch.float64).view(4, 3)
    view = SimpleNamespace(
        pool_token=torch.tensor([3, 1, 2]), pool_slot=torch.tensor([5, 5, 0])
    )
    mean_BDR, count_BD = pool(output_MR, view, users=3, domains=2)
    assert count_BD.tolist() == [[1, 0], [0, 0], [0, 2]]
    assert mean_BDR[2, 1].tolist() == [6.0, 7.0, 8.0]
    assert mean_BDR[0, 0].tolist() == [6.0, 7.0, 8.0]
    assert not mean_BDR[1].any() and not mean_BDR[0, 1].any()
