"""The products that a step's limit is taken from are those that are computed, and the sums over them are right."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import limits
from benchmarks.workload import dataset_of, draw
from syncrec.batch.build import build_batch
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from tests.helpers.reference import EQUATIONS
from trainer.config.negatives import NegativesConfig

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Operations of all products of matrices of weights that are computed, by (left, right) shapes' numbers."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.operations += 2 * left.numel() * right.shape[-1]
        return function(*args, **kwargs or {})


def test_a_steps_products_are_those_that_are_computed():
    sizes = dict(dim=32, max_length=16, experts=5, cross_experts=3, ffn_dim=48)
    config = ModelConfig(
        **sizes, **EQUATIONS, dropout=0.0, loss="bpr", kernel="plain"
    )  # the counter does not see into the fused one
    dataset = dataset_of(1000, 3, users=8, steps=1)
    arrays = draw(dataset, 0, 8, 4, 16, NegativesConfig(shared=0))
    batch = move(
        build_batch(*arrays, [domain.items for domain in dataset.domains], 16),
        "cpu",
    )
    rows = torch.randn(len(batch.ids), 32, requires_grad=True)
    products = limits.step_products(config, batch)
    expected = sum(
        product.operations * count
        for of in products.values()
        for product, count in of.items()
    )
    with Products() as computed:
        SyNCRec(config, 3)(batch, rows)[0].backward()
    # Mixtures, scores and SC-MIM come on top.
    assert expected < computed.operations < 1.06 * expected
    forward = limits.step_products(config, batch, backward=False)
    assert all(forward[name] <= products[name] for name in products)
    live = 3 * len(batch.cross.input_M) + 2 * len(batch.single.input_M)
    stopped = 2 * len(batch.cross.input_M) + 3 * len(batch.single.input_M)
    of_experts = [
        sum(
            product.operations * count
            for product, count in of["experts"].items()
        )
        for of in (products, forward)
    ]
    assert of_experts[0] / of_experts[1] == pytest.approx(
        (3 * live + stopped) / (live + stopped)
    )


@pytest.mark.parametrize("flipped", ["", "left", "right"])
def test_operands_have_the_shapes_and_strides_of_the_product(flipped):
    for experts in (1, 3):
        product = limits.Product(experts, 4, 5, 6, flipped)
        left, right, out = product.operands(torch.float32, CPU)
        assert (left.shape[-2:], right.shape[-2:]) == (
            (4, 5),
            (5, 6),
        ) and left.dim() == (2 if experts == 1 else 3)
        assert (left.is_contiguous(), right.is_contiguous()) == (
            flipped != "left",
            flipped != "right",
        )
        torch.testing.assert_close(
            torch.matmul(left, right, out=out), left @ right
        )
        assert product.operations == experts * 2 * 4 * 5 * 6


def test_sums_and_the_fastest_of_several():
    products = Counter(
        {limits.Product(2, 8, 8, 8): 3, limits.Product(1, 8, 4, 8, "left"): 2}
    )
    found = [
        limits.matmul(products, torch.float32, CPU, window=1e-4)
        for _ in range(2)
    ]
    best = limits.fastest(found)
    assert best["operations"] == 3 * 2 * 2 * 8**3 + 2 * 2 * 8 * 4 * 8
    for shape, seconds in best["seconds"].items():
        assert seconds == min(of["seconds"][shape] for of in found)
    assert best["seconds_per_step"] == pytest.approx(
        limits.seconds_of(best, products)
    )
    assert best["rate"] == pytest.approx(
        best["operations"] / best["seconds_per_step"]
    )


def test_bytes_are_counted_by_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(
        limits,
        "best_seconds",
        lambda function, device, window: function() is None or 2.0,
    )
    found = limits.memory(CPU, row_bytes=32, size=4096, rows=160)
    assert found == {
        "copy": 2 * 4096 / 2,
        "add": 3 * 4096 / 2,
        "gather": 2 * 10 * 32 / 2,
    }


def test_best_is_of_calls_that_ran():
    calls = []
    best = limits.best_seconds(
        lambda: calls.append(np.linalg.norm(np.ones(1000))), CPU, window=1e-4
    )
    assert 0 < best < 1 and len(calls) > 5
