import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import embeddings.checkpoint
import embeddings.table
from embeddings.checkpoint import ShardCopy, load_shard
from embeddings.config import TableConfig
from embeddings.optimizers import fused_params
from embeddings.placement import Capacity
from embeddings.row_scatter import RowScatter
from embeddings.table import ItemTable, bag_lengths, count_bags
from tests.helpers import table_worker
from tests.helpers.alone import group_of_one
from tests.helpers.rank_processes import run_on_cpu_ranks
from tests.helpers.table_worker import CONFIG, GROUP_SIZES, RATES, ROWS, step

RANKS = (2, 4, 1, 3)  # four: two groups of two, with a copy each


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker finds at each number of ranks, each of which also loads what those before saved."""
    folder, saved, found = tmp_path_factory.mktemp("table"), [], {}
    for ranks in RANKS:
        if ranks == 1:
            with group_of_one():
                table_worker.main(folder, *saved)
        else:
            run_on_cpu_ranks(
                ranks, "tests.helpers.table_worker", folder, *saved
            )
        found[ranks] = dict(np.load(folder / f"ranks-{ranks}.npz"))
        saved.append(folder / f"saved-{ranks}")
    return found


@pytest.fixture
def group():
    with group_of_one():
        yield


def adagrad(
    start, rates=(*RATES, RATES[-1]), scales=(1.0,) * 4
):  # the last is the one after it was saved
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


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", RANKS)
def test_any_number_of_ranks_starts_from_the_same_rows(results, ranks):
    start = results[ranks]["start"]
    np.testing.assert_array_equal(start, results[1]["start"])
    assert (
        abs(start.std() - CONFIG.init_std) < 0.01 * CONFIG.init_std
        and abs(start.mean()) < 1e-3
    )
    assert len(np.unique(start[:, 0])) > 0.99 * ROWS
    assert (
        np.corrcoef(start[:, 0], results[ranks]["other_seed"][:, 0])[0, 1]
        < 0.05
    )


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", RANKS)
def test_updates_are_those_of_a_dense_table(results, ranks):
    """Gradients are sums over ranks and duplicates; the third update is at a rate that was set anew."""
    for number, (expected, _) in enumerate(adagrad(results[1]["start"])):
        found = results[ranks][
            f"after_{number}" if number < len(RATES) else "next"
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        untouched = np.setdiff1d(
            np.arange(ROWS),
            np.concatenate([step(n)[0] for n in range(number + 1)]),
        )
        np.testing.assert_array_equal(
            found[untouched], results[1]["start"][untouched]
        )


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", RANKS)
def test_ids_are_looked_up_in_many_bags(results, ranks):
    """A device sorts and looks up bags at the same time, and the ids of one bag after each other."""
    assert results[ranks]["bags_sent"].tolist() == [2048] * 3
    asking = GROUP_SIZES.get(ranks, ranks)
    assert results[ranks]["bags_received"].tolist() == [2048 * asking] * 3


@given(ids=st.integers(0, 10**6), bags=st.integers(1, 5000))
def test_bags_hold_equally_many_ids(ids, bags):
    lengths = bag_lengths(ids, bags, torch.device("cpu"))
    assert len(lengths) == bags and lengths.sum() == ids
    assert lengths.max() - lengths.min() <= 1 and bool(
        (lengths.diff() <= 0).all()
    )


@pytest.mark.parametrize(
    ("ranks", "bags"),
    [(1, 2048), (64, 2048), (128, 1024), (256, 512), (4096, 512)],
)
def test_many_ranks_have_fewer_bags_each(ranks, bags):
    """Each rank is sent the lengths of every other rank's bags."""
    assert count_bags(ranks) == bags


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "precision", "step"),
    [
        (2, "fp16", 2.0**-11),
        (2, "bf16", 2.0**-8),
        (2, "int8", 1.01 / 255),
        (4, "bf16", 2.0**-8),
    ],
)
def test_rows_and_gradients_may_travel_in_fewer_bits(
    results, precision, step, ranks
):
    """The rows that are kept stay fp32; what travels is rounded: rows to the format, gradients, of 1e-8 or of 1, to bf16."""
    found, scales = results[ranks], (1.0, 1e-8, 1.0)
    *_, (expected, squares) = adagrad(results[1]["start"], RATES, scales)
    stored, moved = (
        found[f"{precision}_stored"],
        np.abs(expected - results[1]["start"]).max(),
    )
    error = np.abs(stored - expected).max()
    assert (
        1e-6 * moved < error < 2.0**-7 * moved
    )  # rounded, and by no more than that
    assert (
        np.abs(found[f"{precision}_looked_up"] - stored).max()
        <= step * np.abs(stored).max()
    )
    assert np.unique(stored.astype(np.float16)).size < np.unique(stored).size
    only_small = np.setdiff1d(
        table_worker.step(1)[0],
        np.concatenate([table_worker.step(0)[0], table_worker.step(2)[0]]),
    )
    rows = RowScatter(ROWS).stored(torch.from_numpy(only_small)).numpy()
    np.testing.assert_allclose(
        found[f"{precision}_momentum1"][rows], squares[only_small], rtol=2.0**-6
    )


MOVES = pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        *((2, 1), (2, 2), (2, 3), (2, 4), (4, 4)),
        *((4, 1), (4, 3), (1, 1), (1, 3), (3, 3)),
    ],
)


@pytest.mark.ranks
@MOVES
def test_any_number_of_ranks_loads_what_another_saved(results, saved, loaded):
    """As it was when it was copied: the table went on before it was written."""
    np.testing.assert_array_equal(
        results[loaded][f"from_saved-{saved}"], results[saved]["after_2"]
    )
    assert not np.array_equal(results[saved]["after_2"], results[saved]["next"])


@pytest.mark.ranks
@MOVES
def test_the_fused_optimizers_state_comes_along(results, saved, loaded):
    """The next update is the one that the saver made; to the bit at its number of ranks, elsewhere sums are rounded anew."""
    found, expected = results[loaded], results[saved]
    for name in ("momentum1", "updates"):
        np.testing.assert_array_equal(
            found[f"state_{name}_from_saved-{saved}"], expected[f"state_{name}"]
        )
    assert (
        expected["state_updates"] > 0
        and np.count_nonzero(expected["state_momentum1"]) > 100
    )
    following = found[f"next_from_saved-{saved}"]
    if saved == loaded:
        np.testing.assert_array_equal(following, expected["next"])
    np.testing.assert_allclose(
        following, expected["next"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam"])
def test_an_optimizer_that_the_device_lacks_is_named_with_those_it_has(
    group, optimizer
):
    with pytest.raises(
        ValueError,
        match=f"table.optimizer={optimizer} does not exist on cpu.*adagrad, rowwise_adagrad, sgd",
    ):
        ItemTable(10, 4, TableConfig(optimizer=optimizer), 0, "cpu")


def test_adam_is_fused_on_cuda_with_its_own_parameters():
    params = fused_params(
        TableConfig(optimizer="adam", beta1=0.5, beta2=0.6), "cuda"
    )
    assert (params["beta1"], params["beta2"]) == (0.5, 0.6)
    assert (
        fused_params(TableConfig(), "cuda")["optimizer"]
        == fused_params(TableConfig(), "cpu")["optimizer"]
    )
    assert "beta1" not in fused_params(TableConfig(), "cuda")


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_other_optimizers_step_as_their_definition(group, optimizer):
    table = ItemTable(
        10,
        4,
        TableConfig(optimizer=optimizer, learning_rate=0.5, eps=1e-3),
        0,
        "cpu",
    )
    ids, gradient = (
        torch.tensor([3, 7, 3]),
        torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    )
    before = table(ids).detach()
    for rate in (0.5, 0.25):
        table.set_learning_rate(rate)
        table(ids)
        table.update(gradient)
    total = torch.stack(
        [gradient[0] + gradient[2], gradient[1], gradient[0] + gradient[2]]
    )
    shares = (
        (1, 1)
        if optimizer == "sgd"
        else (1 / (total.abs() + 1e-3), 1 / (2**0.5 * total.abs() + 1e-3))
    )
    expected = before - 0.5 * shares[0] * total - 0.25 * shares[1] * total
    torch.testing.assert_close(table(ids).detach(), expected)


def table_of(rows=10, dim=4, optimizer="auto", seed=0):
    return ItemTable(
        rows,
        dim,
        TableConfig(optimizer=optimizer, learning_rate=0.5),
        seed,
        "cpu",
    )


def drawn_by_hand(rows, dim, std, seed):
    """The first vectors of all stored rows: 4,096 at a time from a generator of their own."""
    blocks = []
    for block in range(-(-rows // 4096)):
        generator = torch.Generator().manual_seed(
            (seed * 0x9E3779B1 + block * 0x85EBCA77 + 1) % 2**63
        )
        blocks.append(torch.randn(4096, dim, generator=generator) * std)
    return torch.cat(blocks)[:rows]


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_draws_the_same_rows(group, monkeypatch, threads):
    monkeypatch.setattr(embeddings.table, "_threads", lambda: threads)
    before = torch.get_num_threads()
    table = ItemTable(10_000, 8, TableConfig(init_std=0.25), 3, "cpu")
    assert torch.equal(
        table.shard()[1]["weight"], drawn_by_hand(10_000, 8, 0.25, 3)
    )
    assert torch.get_num_threads() == before


def test_a_table_may_be_made_without_rows_and_given_some_of_them(
    group, monkeypatch
):
    """Nothing is drawn for rows that are read from a checkpoint, and blocks without new rows are not drawn either."""
    blocks = []
    draw = embeddings.table._draw_block
    monkeypatch.setattr(
        embeddings.table,
        "_draw_block",
        lambda block, *others: blocks.append(block) or draw(block, *others),
    )
    table = ItemTable(
        10_000, 8, TableConfig(init_std=0.25), 3, "cpu", filled=False
    )
    assert not blocks and not table.shard()[1]["weight"].any()
    with pytest.raises(RuntimeError, match="has no rows yet"):
        table(torch.tensor([1]))
    places = np.array([0, 5, 4095, 9000])
    table.fill(places)
    assert sorted(blocks) == [0, 2]
    expected = torch.zeros(10_000, 8)
    expected[places] = drawn_by_hand(10_000, 8, 0.25, 3)[places]
    assert torch.equal(table.shard()[1]["weight"], expected)
    table(torch.tensor([1]))


def test_a_large_table_lies_in_pages_that_no_forked_process_gets(group):
    """`dc` among a mapping's flags: it is not copied when a process is forked."""
    table = ItemTable(40_000, 64, TableConfig(optimizer="adagrad"), 3, "cpu")
    copy = ShardCopy(table)
    for name, tensor in table.shard()[1].items():
        assert "dc" in flags_of(tensor.data_ptr()), name
        assert "dc" in flags_of(copy._tensors[name].data_ptr()), name
        assert torch.equal(copy._tensors[name], tensor)


def flags_of(address):
    """The kernel's flags of the mapping with an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping has it")


@pytest.mark.parametrize("loading", [8, 5, 13])
@pytest.mark.parametrize("known", [True, False])
def test_a_rank_opens_the_files_that_hold_its_rows(
    group, tmp_path, monkeypatch, loading, known
):
    """Eight ranks wrote; their manifest says who has which rows. Without it every file is looked into."""
    rows, values = 1003, torch.arange(1003.0).unsqueeze(1) * torch.ones(1, 4)
    ranges = {}
    for rank in range(8):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: 8)
        copy = ShardCopy(PlainTable(values, rank, 8))
        ranges[copy.write(tmp_path)] = (
            copy.range["first_row"],
            copy.range["rows"],
        )
    opened = []
    monkeypatch.setattr(
        embeddings.checkpoint,
        "safe_open",
        lambda file, framework: (
            opened.append(file) or safe_open(file, framework)
        ),
    )
    for rank in range(loading):
        table = PlainTable(torch.zeros_like(values), rank, loading)
        load_shard(table, tmp_path, ranges if known else None)
        assert torch.equal(
            table.tensors["weight"],
            values[table.first :][: len(table.tensors["weight"])],
        )
    assert rows == sum(count for _, count in ranges.values())
    assert (
        len(opened) == 8 * loading
        if not known
        else len(opened) <= 8 + loading - 1
    )
    if known and loading == 8:
        assert len(opened) == 8


class PlainTable:
    """What the files are written from and read into, without a group of ranks."""

    def __init__(self, values, rank, ranks):
        self.rows, self.scatter, self.updates = (
            len(values),
            RowScatter(len(values)),
            0,
        )
        self.capacity = Capacity(len(values), False, 0, 0)
        share = -(-len(values) // ranks)
        self.first, self.tensors = (
            rank * share,
            {"weight": values[rank * share :][:share].clone()},
        )

    def shard(self):
        return self.first, self.tensors

    @contextlib.contextmanager
    def rewritten(self):
        yield self.shard()


@pytest.mark.parametrize("piece", [1, 100, 1 << 26])
def test_a_file_is_the_same_whatever_it_is_written_in(
    group, tmp_path, monkeypatch, piece
):
    """And safetensors' own reader takes it."""
    table = table_of(rows=50, optimizer="adagrad")
    update(table)
    monkeypatch.setattr(embeddings.checkpoint, "PIECE", piece)
    name = ShardCopy(table).write(tmp_path)
    found = load_file(tmp_path / name)
    _, tensors = table.shard()
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[key], tensors[key]) for key in tensors
    )
    other = ItemTable(
        50, 4, TableConfig(optimizer="adagrad"), 9, "cpu", filled=False
    )
    load_shard(other, tmp_path)
    assert all(
        torch.equal(other.shard()[1][key], tensors[key]) for key in tensors
    )


def update(table):
    table(torch.tensor([3, 7, 3]))
    table.update(
        torch.randn(3, table.dim, generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_copy_is_of_the_moment_it_was_made(group, tmp_path, optimizer):
    """And a table that loads it goes on as the one that was copied, with every optimizer."""
    table, other = (
        table_of(optimizer=optimizer),
        table_of(optimizer=optimizer, seed=1),
    )
    update(table)
    copy = ShardCopy(table)
    expected = {
        name: tensor.clone() for name, tensor in table.shard()[1].items()
    }
    update(table)
    copy.write(tmp_path)
    load_shard(other, tmp_path)
    found = other.shard()[1]
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    update(other)
    assert other.updates == table.updates
    assert all(
        torch.equal(other.shard()[1][name], tensor)
        for name, tensor in table.shard()[1].items()
    )


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
    table, other = (
        table_of(optimizer="adagrad"),
        table_of(optimizer="sgd", seed=1),
    )
    update(table)
    ShardCopy(table).write(tmp_path)
    load_shard(other, tmp_path)
    assert other.shard()[1].keys() == {"weight"} and torch.equal(
        other.shard()[1]["weight"], table.shard()[1]["weight"]
    )


FILE = r"table-00000-of-00001\.safetensors"
OTHERS = {
    "rows": (
        {"rows": 10},
        {"rows": 12},
        f"{FILE}: holds a table of 10 rows, this one has 12",
    ),
    "dim": (
        {"dim": 4},
        {"dim": 8},
        rf"{FILE}: weight is \[10, 4\], this table has rows of \[8\]",
    ),
    "no state": (
        {"optimizer": "sgd"},
        {},
        f"{FILE}: lacks the optimizer's momentum1: it is of another optimizer",
    ),
    "wider state": (
        {"optimizer": "adagrad"},
        {},
        rf"{FILE}: momentum1 is \[10, 4\], this table has rows of \[\]",
    ),
    "narrower state": (
        {},
        {"optimizer": "adagrad"},
        rf"{FILE}: momentum1 is \[10\], this table has rows of \[4\]",
    ),
}


@pytest.mark.parametrize(
    ("saved", "loaded", "message"), OTHERS.values(), ids=OTHERS
)
def test_another_table_is_not_loaded(group, tmp_path, saved, loaded, message):
    ShardCopy(table_of(**saved)).write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_shard(table_of(**loaded), tmp_path)


def test_a_table_with_rows_missing_is_not_loaded(group, tmp_path):
    with pytest.raises(
        ValueError, match="table files hold 0 of the 10 rows of rank 0"
    ):
        load_shard(table_of(), tmp_path)


BAD = {
    "learning_rate": 0,
    "eps": 0,
    "init_std": -1,
    "beta1": 1,
    "beta2": -0.1,
    "cache_share": 0,
    "device_share": 1.5,
}


@pytest.mark.parametrize(("key", "value"), BAD.items())
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"table\.{key} is {value}"):
        TableConfig(**{key: value})
