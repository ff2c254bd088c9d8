import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embeddings.config import TableConfig
from embeddings.optimizers import fused_params
from embeddings.storage import load_shard, save_shard
from embeddings.table import ItemTable
from tests.alone import group_of_one
from tests.embeddings import worker
from tests.embeddings.worker import CONFIG, RATES, ROWS, step

ROOT = Path(__file__).parents[2]
RANKS = (2, 1, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker finds at each number of ranks; those after two ranks also load what two ranks saved."""
    folder, saved, found = tmp_path_factory.mktemp("table"), [], {}
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone"]
    for ranks in RANKS:
        if ranks == 1:
            with group_of_one():
                worker.main(folder, *saved)
        else:
            command = [*torchrun, f"--nproc-per-node={ranks}", "-m", "tests.embeddings.worker", folder, *saved]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-5000:]
        found[ranks] = dict(np.load(folder / f"ranks-{ranks}.npz"))
        saved.append(folder / f"saved-{ranks}")
    return found


@pytest.fixture
def group():
    with group_of_one():
        yield


def adagrad(start):
    """Row-wise Adagrad in float64: one accumulator a row, of the mean squared gradient summed over a row's duplicates."""
    weights, squares = start.astype(np.float64), np.zeros(len(start))
    for number, rate in enumerate(RATES):
        ids, gradient = step(number)
        total = np.zeros_like(weights)
        np.add.at(total, ids, gradient.astype(np.float64))
        squares += (total**2).mean(axis=1)
        weights -= rate * total / (np.sqrt(squares) + CONFIG.eps)[:, None]
        yield weights.copy()


@pytest.mark.parametrize("ranks", RANKS)
def test_any_number_of_ranks_starts_from_the_same_rows(results, ranks):
    start = results[ranks]["start"]
    np.testing.assert_array_equal(start, results[1]["start"])
    assert abs(start.std() - CONFIG.init_std) < 0.01 * CONFIG.init_std and abs(start.mean()) < 1e-3
    assert len(np.unique(start[:, 0])) > 0.99 * ROWS
    assert np.corrcoef(start[:, 0], results[ranks]["other_seed"][:, 0])[0, 1] < 0.05


@pytest.mark.parametrize("ranks", RANKS)
def test_updates_are_those_of_a_dense_table(results, ranks):
    """Gradients are sums over ranks and duplicates; the third update is at a rate that was set anew."""
    for number, expected in enumerate(adagrad(results[1]["start"])):
        found = results[ranks][f"after_{number}"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        untouched = np.setdiff1d(np.arange(ROWS), np.concatenate([step(n)[0] for n in range(number + 1)]))
        np.testing.assert_array_equal(found[untouched], results[1]["start"][untouched])


@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (2, 2), (2, 3), (1, 1), (1, 3), (3, 3)])
def test_any_number_of_ranks_loads_what_another_saved(results, saved, loaded):
    np.testing.assert_array_equal(results[loaded][f"from_saved-{saved}"], results[saved]["after_2"])


@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam"])
def test_an_optimizer_that_the_device_lacks_is_named_with_those_it_has(group, optimizer):
    with pytest.raises(ValueError, match=f"table.optimizer={optimizer} does not exist on cpu.*adagrad, rowwise_adagrad, sgd"):
        ItemTable(10, 4, TableConfig(optimizer=optimizer), 0, "cpu")


def test_adam_is_fused_on_cuda_with_its_own_parameters():
    params = fused_params(TableConfig(optimizer="adam", beta1=0.5, beta2=0.6), "cuda")
    assert (params["beta1"], params["beta2"]) == (0.5, 0.6)
    assert fused_params(TableConfig(), "cuda")["optimizer"] == fused_params(TableConfig(), "cpu")["optimizer"]
    assert "beta1" not in fused_params(TableConfig(), "cuda")


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_other_optimizers_step_as_their_definition(group, optimizer):
    table = ItemTable(10, 4, TableConfig(optimizer=optimizer, learning_rate=0.5, eps=1e-3), 0, "cpu")
    ids, gradient = torch.tensor([3, 7, 3]), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    before = table(ids).detach()
    for rate in (0.5, 0.25):
        table.set_learning_rate(rate)
        table(ids)
        table.update(gradient)
    total = torch.stack([gradient[0] + gradient[2], gradient[1], gradient[0] + gradient[2]])
    shares = (1, 1) if optimizer == "sgd" else (1 / (total.abs() + 1e-3), 1 / (2**0.5 * total.abs() + 1e-3))
    expected = before - 0.5 * shares[0] * total - 0.25 * shares[1] * total
    torch.testing.assert_close(table(ids).detach(), expected)


def table_of(rows, dim=4):
    return ItemTable(rows, dim, TableConfig(), 0, "cpu")


def test_a_table_of_another_size_is_not_loaded(group, tmp_path):
    save_shard(table_of(10), tmp_path)
    with pytest.raises(ValueError, match=r"table-00000-of-00001\.safetensors: holds a table of 10 rows, this one has 12"):
        load_shard(table_of(12), tmp_path)


def test_a_table_with_rows_missing_is_not_loaded(group, tmp_path):
    with pytest.raises(ValueError, match="table files hold 0 of the 10 rows of rank 0"):
        load_shard(table_of(10), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 0), ("eps", 0), ("init_std", -1), ("beta1", 1), ("beta2", -0.1)])
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"table\.{key} is {value}"):
        TableConfig(**{key: value})
