"""Figures of models that were trained on a log whose times are days."""

import numpy as np
import pytest

from tests.unit.trainer.data.prepare.test_pipeline import write
from tests.unit.trainer.data.test_tie_order import drawn_days
from trainer import fit, prepare

SETTINGS = {
    "epochs": 4,
    "global_batch_size": 64,
    "model": {
        "dim": 8,
        "ffn_dim": 8,
        "max_length": 16,
        "experts": 2,
        "cross_experts": 1,
        "blocks": 1,
        "time_knots": 8,
        "dropout": 0.0,
        "kernel": "plain",
    },
    "optimizer": {"learning_rate": 0.01},
    "negatives": {"shared": 32},
    "stream": {"workers": 0},
    "log": {"every": 100, "tensorboard": False},
}


def mean_ndcg(folder, rows, seed):
    """NDCG@10 of all test users together."""
    log = write(folder / f"log-{seed}.csv", rows)
    data = prepare(log, folder / f"data-{seed}", seed=seed)
    run = fit(data, folder / f"run-{seed}", seed=seed, **SETTINGS)
    domains = run.evaluate().by_domain
    users = sum(domain.users for domain in domains)
    return sum(one.users * one.headline for one in domains) / users


@pytest.mark.slow
def test_names_of_domains_in_another_order_give_the_same_figures(tmp_path):
    """What is drawn at random has nothing to be learned; an order of names or ids would have."""
    figures = {}
    for names in (("a", "m", "z"), ("z", "m", "a")):
        folder = tmp_path / names[0]
        folder.mkdir()
        rows = drawn_days(names, users=300)
        figures[names] = [mean_ndcg(folder, rows, seed) for seed in range(3)]
    ahead, reverse = figures.values()
    spread = np.std(ahead + reverse, ddof=1)
    assert abs(np.mean(ahead) - np.mean(reverse)) < 2 * spread
    # A guess among the items of a domain that a user has not had is at 0.14.
    assert max(ahead + reverse) < 0.18, figures
