"""The same seed, data and global batch give the same run at any world size and ZeRO stage."""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import HELPERS
from tests.helpers.left import table_files
from tests.ranks.conftest import ranks_of, run

WORKER = HELPERS.joinpath("stages.py")
STAGES = ["0", "1", "2", "3"]
ACCUMULATED = [f"{stage}x4" for stage in STAGES]


@dataclass
class Outcome:
    """What a run leaves: figures of each logged step, and the last model."""

    losses: np.ndarray
    lambdas: np.ndarray
    norms: np.ndarray
    dense: dict
    table: np.ndarray
    test: dict


def read(folder: Path) -> Outcome:
    """The outcome of a finished run."""
    records = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if record["kind"] == "train"]
    checkpoint = (
        folder / json.loads((folder / "best.json").read_text())["folder"]
    )
    return Outcome(
        losses=np.array(
            [
                [
                    s[k]
                    for k in (
                        "loss",
                        "loss_single",
                        "loss_cross",
                        "mutual_information",
                    )
                ]
                for s in steps
            ]
        ),
        lambdas=np.array([list(s["lambda"].values()) for s in steps]),
        norms=np.array([s["gradient_norm"] for s in steps], float),
        dense=load_file(checkpoint / "dense.safetensors"),
        table=np.concatenate(
            [load_file(shard)["weight"] for shard in table_files(checkpoint)]
        ),
        test=records[-1],
    )


FEW, MANY = 8, 50


@pytest.fixture(
    scope="module",
    params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)],
)
def steps(request):
    """How many steps the runs have."""
    return request.param


@pytest.fixture(scope="module")
def outcomes(dataset, steps, tmp_path_factory):
    """Every world size and stage, each started when first asked for: outcomes(ranks, stage)."""
    folder = tmp_path_factory.mktemp("stages")

    @functools.cache
    def started(ranks, stages, group_size):
        own = [f"max_steps={steps}", f"table.group_size={group_size}"]
        output = folder / f"{ranks}-{group_size}-{'-'.join(stages)}"
        run(ranks_of(ranks, WORKER, dataset, output, *stages, *own))
        return {stage: read(output / stage) for stage in stages}

    def outcome(ranks, stage, group_size=0):
        if group_size:
            return started(ranks, (stage,), group_size)[stage]
        # Four ranks take long on two cores: each of their stages may run without the others.
        stages = (*STAGES, ACCUMULATED[0])
        if ranks == 4:
            stages = (stage,)
        elif stage not in stages:
            stages = tuple(ACCUMULATED[1:])
        return started(ranks, stages, 0)[stage]

    return outcome


def test_the_steps_train(outcomes, steps):
    losses = outcomes(1, "0").losses
    assert losses.shape == (steps, 4) and np.isfinite(losses).all()
    assert np.abs(losses[:, 3]).min() > 0  # SC-MIM takes part
    if steps == MANY:
        assert losses[-10:, 0].mean() < 0.95 * losses[:5, 0].mean()


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        *itertools.product((1, 2), STAGES),
        (4, "2"),
        *(pytest.param(4, stage, marks=pytest.mark.slow) for stage in "013"),
    ],
)
def test_same_run(outcomes, steps, ranks, stage):
    """Largest relative differences seen: losses 2e-7, λ 4e-7, table 3e-7, dense 2e-6, gradient norms 2e-7 (in 8).

    After few steps weights that begin at 0 are small still: 1.2e-5 of the knots.
    """
    one, other = outcomes(1, "0"), outcomes(ranks, stage)
    tolerance = 5e-5 if steps == FEW else 1e-5
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(other.lambdas, one.lambdas, rtol=1e-5)
    np.testing.assert_allclose(other.norms, one.norms, rtol=1e-5)
    assert np.linalg.norm(other.table - one.table) <= 1e-5 * np.linalg.norm(
        one.table
    )
    assert other.dense.keys() == one.dense.keys()
    for name, weights in one.dense.items():
        assert np.linalg.norm(other.dense[name] - weights) <= tolerance * max(
            np.linalg.norm(weights), 1e-3
        ), name


@pytest.mark.parametrize(
    ("ranks", "group_size"),
    [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_copies_of_the_table_change_nothing(outcomes, steps, ranks, group_size):
    """Two groups of ranks with a copy each, after one copy on all ranks."""
    one = outcomes(ranks, "2")
    two = outcomes(ranks, "2", group_size)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(two.lambdas, one.lambdas, rtol=1e-5)
    np.testing.assert_allclose(two.norms, one.norms, rtol=1e-5)
    difference = np.linalg.norm(two.table - one.table)
    assert difference <= 1e-6 * np.linalg.norm(one.table)
    print(
        f"{ranks} ranks, {steps} steps: losses",
        np.abs(two.losses / one.losses - 1).max(),
        "table",
        difference / np.linalg.norm(one.table),
    )


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (1, "0"),
        (2, "0"),
        *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in "123"),
    ],
)
def test_accumulation_over_four_is_one_batch(outcomes, steps, ranks, stage):
    """To 1e-6; over more steps λ, which follows a small difference of losses, drifts apart.

    tests/unit/syncrec/test_model.py holds losses, λ and gradients to 1e-9, in float64.
    """
    whole, cut = outcomes(ranks, stage), outcomes(ranks, f"{stage}x4")
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-6)
    np.testing.assert_allclose(cut.norms, whole.norms, rtol=1e-6)
    drift = 1e-6 if steps == FEW else 3e-6
    np.testing.assert_allclose(cut.lambdas, whole.lambdas, rtol=drift)
    assert np.linalg.norm(cut.table - whole.table) <= 1e-6 * np.linalg.norm(
        whole.table
    )
    assert cut.dense.keys() == whole.dense.keys()
    weights, others = (
        np.concatenate(
            [
                values.ravel()
                for name, values in sorted(outcome.dense.items())
                if name not in ("clock.newest_tick", "gap.noise_3D")
            ]
        )
        for outcome in (whole, cut)
    )
    assert np.linalg.norm(others - weights) <= 1e-6 * np.linalg.norm(weights)
    assert np.linalg.norm(others - weights) > 0


def test_weights_moved(outcomes, dataset, tmp_path):
    """The comparison is not one of initial weights: both halves have trained."""
    start = tmp_path / "start"
    run(
        ranks_of(
            1,
            WORKER,
            dataset,
            start,
            "0",
            "max_steps=1",
            "optimizer.learning_rate=1e-30",
            "table.learning_rate=1e-30",
        )
    )
    before, after = read(start / "0"), outcomes(1, "0")
    assert np.linalg.norm(after.table - before.table) > 0.1 * np.linalg.norm(
        before.table
    )
    unmoved = [
        name
        for name in before.dense
        if np.allclose(before.dense[name], after.dense[name], rtol=1e-4, atol=0)
    ]
    # The scales are not learned by default; leave-one-out trains on all times.
    assert unmoved == [
        "clock.newest_tick",
        "correction.alpha",
        "correction.beta",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["transformer", "gru"])
def test_shapley_values_are_of_the_global_batch(dataset, tmp_path, encoder):
    """λ of every step at one rank and at two, with weights taken apart too."""
    own = [
        "max_steps=4",
        "model.loss_correction=shapley",
        "model.correction_temperature=0.01",
        f"model.encoder={encoder}",
        "seed=5",  # in whose batches the domains' values lie apart with either encoder
    ]
    for ranks, stages in ((1, ["0"]), (2, ["0", "3"])):
        run(
            ranks_of(
                ranks, WORKER, dataset, tmp_path / str(ranks), *stages, *own
            )
        )
    one, *others = (read(tmp_path / place) for place in ("1/0", "2/0", "2/3"))
    assert (
        one.lambdas.shape == (4, 3) and np.ptp(one.lambdas, axis=1).min() > 0.01
    )
    np.testing.assert_allclose(one.lambdas.sum(1), 3, rtol=1e-5)  # domains
    for other in others:
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(
            other.lambdas, one.lambdas, rtol=1e-4
        )  # values over δ: their rounding times 100


def test_a_sample_of_users_stands_for_the_global_batch(dataset, tmp_path):
    """Of 30 users 5 a domain: the same losses and weights at one rank and at two."""
    own = ["max_steps=4", "model.mutual_information_negatives=5"]
    for ranks in (1, 2):
        run(ranks_of(ranks, WORKER, dataset, tmp_path / str(ranks), "0", *own))
    one, two = (read(tmp_path / place) for place in ("1/0", "2/0"))
    assert one.losses.shape == (4, 4) and np.abs(one.losses[:, 3]).min() > 0
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-5)
    for name, weights in one.dense.items():
        assert np.linalg.norm(two.dense[name] - weights) <= 1e-5 * max(
            np.linalg.norm(weights), 1e-3
        ), name


def test_bf16_is_the_same_with_weights_taken_apart(dataset, tmp_path):
    """Autocast's casts of weights must not outlive the moment in which ZeRO 3 has them together."""
    run(
        ranks_of(
            2,
            WORKER,
            dataset,
            tmp_path,
            "0",
            "3",
            "model.precision=bf16",
            "max_steps=3",
        )
    )
    whole, apart = read(tmp_path / "0"), read(tmp_path / "3")
    assert np.isfinite(whole.losses).all()
    np.testing.assert_allclose(apart.losses, whole.losses, rtol=1e-5)
