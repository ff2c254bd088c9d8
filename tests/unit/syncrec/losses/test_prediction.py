"""The next-item losses against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from syncrec.losses.prediction import prediction_loss

LOSSES = ["sampled_softmax", "bpr", "bce", "bpr_probability"]


def scores(*shape, seed=0):
    return (
        torch.randn(
            *shape,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        * 2
    )


def others(target_L, items):
    """Each row without its target: (L, items − 1)."""
    kept = torch.arange(items) != target_L.unsqueeze(1)
    return (
        torch.arange(items)
        .expand(len(target_L), -1)[kept]
        .view(len(target_L), -1)
    )


def test_sampled_softmax_over_all_items_is_the_full_softmax():
    """Own negatives that are all the others, or shared ones that are all items, target and all."""
    all_LV, target_L = scores(5, 7), torch.tensor([0, 3, 3, 6, 2])
    expected_L = F.cross_entropy(all_LV, target_L, reduction="none")
    positive_L = all_LV.gather(1, target_L.unsqueeze(1)).squeeze(1)
    own = prediction_loss(
        "sampled_softmax",
        positive_L,
        all_LV.gather(1, others(target_L, 7)),
        None,
        7,
    )
    shared = prediction_loss(
        "sampled_softmax",
        positive_L,
        all_LV,
        torch.arange(7) != target_L.unsqueeze(1),
        7,
    )
    torch.testing.assert_close(own, expected_L)
    torch.testing.assert_close(shared, expected_L)


def test_each_sampled_negative_stands_for_its_share_of_the_domain():
    """Two negatives in a domain of 101: each counts fifty times."""
    positive_L, negative_Ln = scores(4), scores(4, 2, seed=1)
    expected_L = -(
        positive_L - (positive_L.exp() + 50 * negative_Ln.exp().sum(1)).log()
    )
    torch.testing.assert_close(
        prediction_loss("sampled_softmax", positive_L, negative_Ln, None, 101),
        expected_L,
    )


def test_bpr_probability_is_equation_8():
    positive_L, negative_Ln = scores(6), scores(6, 3, seed=1)
    for target, loss in enumerate(
        prediction_loss("bpr_probability", positive_L, negative_Ln, None, 9)
    ):
        pairs = []
        for negative in negative_Ln[target].tolist():
            p_plus, p_minus = (
                1 / (1 + math.exp(-score))
                for score in (positive_L[target].item(), negative)
            )
            pairs.append(-math.log(1 / (1 + math.exp(-(p_plus - p_minus)))))
        assert loss.item() == pytest.approx(sum(pairs) / 3, abs=1e-12)


def test_bpr_and_bce_are_what_they_are_called():
    positive_L, negative_Ln = scores(6), scores(6, 3, seed=1)
    bpr_L = -torch.sigmoid(positive_L.unsqueeze(1) - negative_Ln).log().mean(1)
    bce_L = -torch.sigmoid(positive_L).log() - (
        1 - torch.sigmoid(negative_Ln)
    ).log().mean(1)
    torch.testing.assert_close(
        prediction_loss("bpr", positive_L, negative_Ln, None, 9), bpr_L
    )
    torch.testing.assert_close(
        prediction_loss("bce", positive_L, negative_Ln, None, 9), bce_L
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_a_target_among_the_shared_negatives_counts_as_none(kind):
    """The loss is that of the other negatives alone, and no gradient pushes the target away as a negative."""
    positive_L, negative_Ln = scores(4), scores(4, 5, seed=1).requires_grad_()
    allowed_Ln = torch.ones(4, 5, dtype=torch.bool)
    allowed_Ln[0, 2] = allowed_Ln[1, 0] = allowed_Ln[1, 4] = False
    loss_L = prediction_loss(kind, positive_L, negative_Ln, allowed_Ln, 11)
    for target in range(4):
        rest = negative_Ln[target : target + 1, allowed_Ln[target]]
        alone = prediction_loss(
            kind, positive_L[target : target + 1], rest, None, 11
        )
        torch.testing.assert_close(loss_L[target], alone[0])
    loss_L.sum().backward()
    assert torch.equal(negative_Ln.grad != 0, allowed_Ln)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_domain_whose_only_item_is_the_target_has_finite_losses(kind):
    positive_L, negative_Ln = (
        scores(3).requires_grad_(),
        scores(3, 1, seed=1).requires_grad_(),
    )
    loss_L = prediction_loss(
        kind, positive_L, negative_Ln, torch.zeros(3, 1, dtype=torch.bool), 1
    )
    loss_L.sum().backward()
    assert (
        loss_L.isfinite().all()
        and positive_L.grad.isfinite().all()
        and not negative_Ln.grad.any()
    )
    if kind != "bce":
        assert not loss_L.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_positive_fall_with_the_targets_score_and_bear_large_ones(
    kind,
):
    negative_Ln = torch.tensor([[80.0, -80.0]])
    positive = [torch.tensor([score]) for score in (-90.0, 0.0, 90.0)]
    values = [
        prediction_loss(kind, positive_L, negative_Ln, None, 50).item()
        for positive_L in positive
    ]
    assert all(math.isfinite(value) for value in values)
    assert values[0] > values[1] > values[2] >= 0
