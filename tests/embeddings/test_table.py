import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.config import TableConfig
from embeddings.optimizers import fused_params
from embeddings.rows import RowScatter
from embeddings.storage import ShardCopy, load_shard
from embeddings.table import ItemTable, bag_lengths, bags_of_rank
from tests.alone import group_of_one
from tests.embeddings import worker
from tests.embeddings.worker import CONFIG, RATES, ROWS, step
from tests.ranks import run_on_cpu_ranks

RANKS = (2, 1, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker finds at each number of ranks; those after two ranks also load what two ranks saved."""
    folder, saved, found = tmp_path_factory.mktemp("table"), [], {}
    for ranks in RANKS:
        if ranks == 1:
            with group_of_one():
                worker.main(folder, *saved)
        else:
            run_on_cpu_ranks(ranks, "tests.embeddings.worker", folder, *saved)
        found[ranks] = dict(np.load(folder / f"ranks-{ranks}.npz"))
        saved.append(folder / f"saved-{ranks}")
    return found


@pytest.fixture
def group():
    with group_of_one():
        yield


def adagrad(start, rates=(*RATES, RATES[-1]), scales=(1.0,) * 4):  # the last is the one after it was saved
    """Row-wise Adagrad in float64: one accumulator a row, of the mean squared gradient summed over a row's duplicates.

    scales: of each step's gradient. Yields (weights, accumulators).
    """
    weights, squares = start.astype(np.float64), np.zeros(len(start))
    for number, rate in enumerate(rates):
        ids, gradient = step(number)
        total = np.zeros_like(weights)
        np.add.at(total, ids, scales[number] * gradient.astype(np.float64))
        squares += (total**2).mean(axis=1)
        weights -= rate * total / (np.sqrt(squares) + CONFIG.eps)[:, None]
        yield weights.copy(), squares.copy()


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
    for number, (expected, _) in enumerate(adagrad(results[1]["start"])):
        found = results[ranks][f"after_{number}" if number < len(RATES) else "next"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        untouched = np.setdiff1d(np.arange(ROWS), np.concatenate([step(n)[0] for n in range(number + 1)]))
        np.testing.assert_array_equal(found[untouched], results[1]["start"][untouched])


@pytest.mark.parametrize("ranks", RANKS)
def test_ids_are_looked_up_in_many_bags(results, ranks):
    """A device sorts and looks up bags at the same time, and the ids of one bag after each other."""
    assert results[ranks]["bags_sent"].tolist() == [2048] * 3
    assert results[ranks]["bags_received"].tolist() == [2048 * ranks] * 3


@given(ids=st.integers(0, 10**6), bags=st.integers(1, 5000))
def test_bags_hold_equally_many_ids(ids, bags):
    lengths = bag_lengths(ids, bags, torch.device("cpu"))
    assert len(lengths) == bags and lengths.sum() == ids
    assert lengths.max() - lengths.min() <= 1 and bool((lengths.diff() <= 0).all())


@pytest.mark.parametrize(("ranks", "bags"), [(1, 2048), (64, 2048), (128, 1024), (256, 512), (4096, 512)])
def test_many_ranks_have_fewer_bags_each(ranks, bags):
    """Each rank is sent the lengths of every other rank's bags."""
    assert bags_of_rank(ranks) == bags


@pytest.mark.parametrize(("precision", "step"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_rows_and_gradients_may_travel_in_half_precision(results, precision, step):
    """The rows that are kept stay fp32; what travels is rounded: rows to the format, gradients, of 1e-8 or of 1, to bf16."""
    found, scales = results[2], (1.0, 1e-8, 1.0)
    *_, (expected, squares) = adagrad(results[1]["start"], RATES, scales)
    stored, moved = found[f"{precision}_stored"], np.abs(expected - results[1]["start"]).max()
    error = np.abs(stored - expected).max()
    assert 1e-6 * moved < error < 2.0**-7 * moved  # rounded, and by no more than that
    assert np.abs(found[f"{precision}_looked_up"] - stored).max() <= step * np.abs(stored).max()
    assert np.unique(stored.astype(np.float16)).size < np.unique(stored).size
    only_small = np.setdiff1d(worker.step(1)[0], np.concatenate([worker.step(0)[0], worker.step(2)[0]]))
    rows = RowScatter(ROWS).stored(torch.from_numpy(only_small)).numpy()
    np.testing.assert_allclose(found[f"{precision}_momentum1"][rows], squares[only_small], rtol=2.0**-6)


MOVES = pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (2, 2), (2, 3), (1, 1), (1, 3), (3, 3)])


@MOVES
def test_any_number_of_ranks_loads_what_another_saved(results, saved, loaded):
    """As it was when it was copied: the table went on before it was written."""
    np.testing.assert_array_equal(results[loaded][f"from_saved-{saved}"], results[saved]["after_2"])
    assert not np.array_equal(results[saved]["after_2"], results[saved]["next"])


@MOVES
def test_the_fused_optimizers_state_comes_along(results, saved, loaded):
    """The next update is the one that the saver made; to the bit at its number of ranks, elsewhere sums are rounded anew."""
    found, expected = results[loaded], results[saved]
    for name in ("momentum1", "updates"):
        np.testing.assert_array_equal(found[f"state_{name}_from_saved-{saved}"], expected[f"state_{name}"])
    assert expected["state_updates"] > 0 and np.count_nonzero(expected["state_momentum1"]) > 100
    following = found[f"next_from_saved-{saved}"]
    if saved == loaded:
        np.testing.assert_array_equal(following, expected["next"])
    np.testing.assert_allclose(following, expected["next"], rtol=1e-5, atol=1e-7)


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


def table_of(rows=10, dim=4, optimizer="auto", seed=0):
    return ItemTable(rows, dim, TableConfig(optimizer=optimizer, learning_rate=0.5), seed, "cpu")


def update(table):
    table(torch.tensor([3, 7, 3]))
    table.update(torch.randn(3, table.dim, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_copy_is_of_the_moment_it_was_made(group, tmp_path, optimizer):
    """And a table that loads it goes on as the one that was copied, with every optimizer."""
    table, other = table_of(optimizer=optimizer), table_of(optimizer=optimizer, seed=1)
    update(table)
    copy = ShardCopy(table)
    expected = {name: tensor.clone() for name, tensor in table.shard()[1].items()}
    update(table)
    copy.write(tmp_path)
    load_shard(other, tmp_path)
    found = other.shard()[1]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    update(other)
    assert other.updates == table.updates
    assert all(torch.equal(other.shard()[1][name], tensor) for name, tensor in table.shard()[1].items())


def test_looking_up_for_a_validation_is_no_update(group):
    """Adam's bias correction counts updates, and a run that validates once more is no other run."""
    table = table_of(optimizer="rowwise_adagrad")
    for count in (1, 2):
        update(table)
        assert table.updates == count
        with torch.no_grad():
            table(torch.tensor([1, 2]))
        assert table.updates == count


def test_a_table_without_optimizer_state_takes_the_rows_alone(group, tmp_path):
    """For evaluation, whatever it was trained with."""
    table, other = table_of(optimizer="adagrad"), table_of(optimizer="sgd", seed=1)
    update(table)
    ShardCopy(table).write(tmp_path)
    load_shard(other, tmp_path)
    assert other.shard()[1].keys() == {"weight"} and torch.equal(other.shard()[1]["weight"], table.shard()[1]["weight"])


FILE = r"table-00000-of-00001\.safetensors"
OTHERS = {
    "rows": ({"rows": 10}, {"rows": 12}, f"{FILE}: holds a table of 10 rows, this one has 12"),
    "dim": ({"dim": 4}, {"dim": 8}, rf"{FILE}: weight is \[10, 4\], this table has rows of \[8\]"),
    "no state": ({"optimizer": "sgd"}, {}, f"{FILE}: lacks the optimizer's momentum1: it is of another optimizer"),
    "wider state": ({"optimizer": "adagrad"}, {}, rf"{FILE}: momentum1 is \[10, 4\], this table has rows of \[\]"),
    "narrower state": ({}, {"optimizer": "adagrad"}, rf"{FILE}: momentum1 is \[10\], this table has rows of \[4\]"),
}


@pytest.mark.parametrize(("saved", "loaded", "message"), OTHERS.values(), ids=OTHERS)
def test_another_table_is_not_loaded(group, tmp_path, saved, loaded, message):
    ShardCopy(table_of(**saved)).write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_shard(table_of(**loaded), tmp_path)


def test_a_table_with_rows_missing_is_not_loaded(group, tmp_path):
    with pytest.raises(ValueError, match="table files hold 0 of the 10 rows of rank 0"):
        load_shard(table_of(), tmp_path)


BAD = {"learning_rate": 0, "eps": 0, "init_std": -1, "beta1": 1, "beta2": -0.1, "cache_share": 0, "device_share": 1.5}


@pytest.mark.parametrize(("key", "value"), BAD.items())
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"table\.{key} is {value}"):
        TableConfig(**{key: value})
