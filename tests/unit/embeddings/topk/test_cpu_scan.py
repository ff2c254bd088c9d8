"""The compiled scan by itself: its products, its tiles, when it runs. test_ranking.py holds its results to a brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from embeddings.topk import bounds, cpu_scan
from embeddings.topk.chunks import Strip, UserPart
from embeddings.topk.torch_scan import scores_and_rows
from syncrec_kernels.build import why_unavailable
from tests.helpers import ranking_worker
from tests.helpers.alone import group_of_one
from tests.helpers.ranking_cases import made

if why_unavailable("scan", "its tests are skipped"):
    pytest.skip(
        f"no compiled scan here: {why_unavailable('scan', 'its tests are skipped')}",
        allow_module_level=True,
    )

NOTHING = torch.zeros(0, dtype=torch.int64)


class Alone:
    """A shard with all rows, in order."""

    def __init__(self, weight):
        self.weight = weight

    def row(self, place):
        return place


class Whole:
    """Its only strip."""

    def __init__(self, rows):
        self.bounds = [0, rows]

    def of(self, weight):
        row = torch.arange(len(weight))
        return Strip(0, row, row, cpu_scan.pack_items(weight, row), 1)


@pytest.mark.parametrize("dim", [4, 64, 132])
def test_a_product_is_never_further_from_the_score_than_the_error(dim):
    """Also for vectors that nearly cancel, and of lengths far apart."""
    generator = torch.Generator().manual_seed(dim)
    y_UR, m_NR = (
        torch.randn(200, dim, generator=generator)
        * torch.randn(200, 1, generator=generator).exp()
        for _ in "ym"
    )
    m_NR[::2] -= (
        y_UR[:100]
        * (m_NR[::2] * y_UR[:100]).sum(1, True)
        / y_UR[:100].square().sum(1, True)
    )
    for item in range(
        200
    ):  # one by one: the error of a strip is that of its longest vector
        shard, strips = Alone(m_NR[item : item + 1]), Whole(1)
        part, strip = (
            UserPart(y_UR, NOTHING, NOTHING, shard, strips),
            strips.of(shard.weight),
        )
        best = cpu_scan.TopK(part, 1)
        best.scan(strip)
        exact_U = part.exact(
            torch.arange(200), torch.zeros(200, dtype=torch.int64)
        )
        error_U = bounds.error(part.y, strip.items)
        assert strip.items.longest >= shard.weight.double().norm()
        assert (
            (best._products_UC[:, 0].double() - exact_U.double()).abs()
            <= error_U
        ).all()
        assert (
            error_U <= 1.01 * bounds.error(part.y, bounds.Vectors(shard.weight))
        ).all()


@pytest.mark.parametrize("dim", [4, 12, 16, 36, 100, 260])
def test_panels_are_the_vectors_and_wild_ones_no_numbers(dim):
    m_NR = torch.randn(75, dim)
    m_NR[3, 1], m_NR[40, 0], m_NR[41] = torch.nan, -torch.inf, 1e19
    place = torch.randperm(75)[:70]
    panels = cpu_scan.pack_items(m_NR, place)
    columns = panels.packed.transpose(1, 2).reshape(96, dim)
    wild = torch.isin(place, torch.tensor([3, 40, 41]))
    assert (
        columns[:70][wild].isnan().all()
        and torch.equal(columns[:70][~wild], m_NR[place[~wild]])
        and not columns[70:].any()
    )
    longest = m_NR[place[~wild]].double().norm(dim=1).max()
    assert longest <= panels.longest <= 1.01 * longest


@pytest.mark.parametrize(
    ("users", "dim", "items"),
    [(users, 8, 200) for users in range(1, 26)] + [(2100, 132, 70)],
)
def test_any_number_of_users_is_ranked_as_without_the_kernel(users, dim, items):
    """Of them 12 are multiplied at once, and what stays in a cache goes through the items together."""
    case = replace(
        made(users, rows=items, dim=dim, users=users, had=5), users=4096
    )
    with group_of_one():
        table = ranking_worker.table_of(case.m_NR)
        found = {}
        for way in ranking_worker.WAYS:
            with ranking_worker.by(way):
                found[way] = ranking_worker.ranked(case, table)
    for what, expected in found["plain"].items():
        np.testing.assert_array_equal(found["scan"][what], expected, what)


def test_a_rank_without_rows_has_none_of_the_best():
    shard, strips = Alone(torch.zeros(0, 4)), Whole(1)
    part = UserPart(torch.randn(3, 4), NOTHING, NOTHING, shard, strips)
    rows_Uk = scores_and_rows(cpu_scan.TopK(part, 2).best_keys())[1]
    assert (
        torch.equal(rows_Uk, torch.full((3, 2), -1))
        and not cpu_scan.ItemsAhead(part, torch.zeros(3)).count().any()
    )


def test_it_is_for_tame_users():
    assert cpu_scan.supports(torch.randn(3, 4))
    for value in (torch.nan, torch.inf, 1e30):
        assert not cpu_scan.supports(torch.tensor([[1.0, 2.0], [value, 0.0]]))
