import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.evaluation.candidate_files
from syncrec.batch.build import build_query
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.load import load_config
from trainer.errors import InputError
from trainer.evaluation.candidate_files import (
    Homes,
    ResultWriter,
    _CandidateCollector,
    read_candidates,
    read_candidates_of_rank,
)
from trainer.evaluation.sampled import Candidates, RankingBatches


@pytest.fixture
def dataset(tmp_path):
    """Rows 0 … 4 and 8 … 11; `both` is an item of either domain."""
    items = [
        ["both", *(f"a{item}" for item in range(1, 5))],
        ["both", *(f"b{item}" for item in range(1, 4))],
    ]
    return write_dataset(tmp_path / "data", draw_histories(6), item_ids=items)


def write(folder, **columns):
    pq.write_table(pa.table(columns), folder / "given.parquet")
    return folder / "given.parquet"


def as_lists(given):
    return {
        user: (domain, rows.tolist()) for user, (domain, rows) in given.items()
    }


def test_raw_ids_become_rows_with_the_positive_first(dataset, tmp_path):
    file = write(
        tmp_path,
        extra=[1, 2, 3],
        user_id=["u5", "u0", "u2"],
        positive=["a1", "b2", "a4"],
        negatives=[["a4", "both"], ["b3", "b1", "b3"], []],
    )
    found = read_candidates(dataset, file)
    assert as_lists(found) == {
        5: (0, [1, 4, 0]),
        0: (1, [10, 11, 9, 11]),
        2: (0, [4]),
    }
    assert all(
        isinstance(user, int) and rows.dtype == np.int64
        for user, (_, rows) in found.items()
    )


def test_a_domain_column_tells_equal_ids_apart(dataset, tmp_path):
    file = write(
        tmp_path,
        user_id=["u1", "u2", "u3"],
        domain=["domain 1", "domain 0", None],
        positive=["both", "both", "b1"],
        negatives=[["b1"], ["a1"], ["both"]],
    )
    assert as_lists(read_candidates(dataset, file)) == {
        1: (1, [8, 9]),
        2: (0, [0, 1]),
        3: (1, [9, 8]),
    }


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.int16(), pa.string(), pa.large_string()]
)
def test_integer_ids_are_the_same_whatever_they_are_written_as(tmp_path, kind):
    items = [[30, 10, 20, 50, 40], [1, 2, 3, 4]]
    dataset = write_dataset(
        tmp_path / "data",
        draw_histories(3),
        user_ids=[700, 5, -2],
        item_ids=items,
    )

    def column(values):
        return pa.array(values).cast(kind)

    negatives = pa.ListArray.from_arrays([0, 2, 3], column([30, 50, 4]))
    file = write(
        tmp_path,
        user_id=column([-2, 700]),
        positive=column([10, 1]),
        negatives=negatives,
    )
    assert as_lists(read_candidates(dataset, file)) == {
        2: (0, [1, 0, 3]),
        0: (1, [8, 11]),
    }


def test_an_empty_file_gives_no_candidates(dataset, tmp_path):
    texts = pa.array([], pa.string())
    file = write(
        tmp_path,
        user_id=texts,
        positive=texts,
        negatives=pa.array([], pa.list_(pa.string())),
    )
    assert read_candidates(dataset, file) == {}


GOOD = {
    "user_id": ["u0", "u1", "u2"],
    "positive": ["a1", "a2", "b1"],
    "negatives": [["a3"], ["a1", "a3"], ["b2"]],
}
LISTS = pa.list_(pa.string())
BAD = {
    "no positive": ({"positive": None}, ["has no column positive", "user_id"]),
    "other names": (
        {"positive": None, "negatives": None},
        ["has no column negatives, positive"],
    ),
    "negatives of text": (
        {"negatives": ["a3", "a1", "b2"]},
        ["the column negatives is VARCHAR"],
    ),
    "negatives of numbers": (
        {"negatives": [1, 2, 3]},
        ["the column negatives is BIGINT"],
    ),
    "an unknown user": (
        {"user_id": ["u0", "nobody", "x"]},
        ["row 1", "nobody"],
    ),
    "a null user": ({"user_id": ["u0", "u1", None]}, ["row 2", "user_id"]),
    "a user twice": (
        {"user_id": ["u0", "u1", "u0"]},
        ["row 2", "u0", "earlier"],
    ),
    "an unknown positive": (
        {"positive": ["a1", "z", "b1"]},
        ["row 1", "item z"],
    ),
    "a null positive": ({"positive": ["a1", None, "b1"]}, ["row 1"]),
    "a positive of two domains": (
        {"positive": ["a1", "a2", "both"]},
        ["row 2", "both", "domain"],
    ),
    "an unknown negative": (
        {"negatives": [["a3"], ["a1", "q"], ["b2"]]},
        ["row 1", "item q"],
    ),
    "a null negative": (
        {"negatives": [["a3"], ["a1", None], ["b2"]]},
        ["row 1"],
    ),
    "a negative of the other domain": (
        {"negatives": [["a3"], ["a1"], ["a1"]]},
        ["row 2", "item a1"],
    ),
    "no list of negatives": (
        {"negatives": pa.array([["a3"], None, ["b2"]], LISTS)},
        ["row 1", "u1", "negatives"],
    ),
    "the positive among the negatives": (
        {"negatives": [["a3"], ["a2"], ["b2"]]},
        ["row 1", "a2"],
    ),
    "an unknown domain": (
        {"domain": ["domain 0", "domain 0", "moon"]},
        ["row 2", "moon"],
    ),
    "a domain without the positive": (
        {"domain": ["domain 0", "domain 1", "domain 1"]},
        ["row 1", "a2"],
    ),
}


@pytest.mark.parametrize(("change", "named"), BAD.values(), ids=BAD)
def test_candidates_that_cannot_be_used_are_named_by_file_and_row(
    dataset, tmp_path, change, named
):
    columns = {
        name: values
        for name, values in (GOOD | change).items()
        if values is not None
    }
    with pytest.raises(InputError) as error:
        read_candidates(dataset, write(tmp_path, **columns))
    assert all(word in str(error.value) for word in ["given.parquet", *named])


def test_the_table_of_bad_candidates_starts_from_good_ones(dataset, tmp_path):
    assert len(read_candidates(dataset, write(tmp_path, **GOOD))) == 3


def test_a_file_that_is_missing_or_no_parquet_is_named(dataset, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.parquet"):
        read_candidates(dataset, tmp_path / "nowhere.parquet")
    for content in (b"", b"hello", b"PAR1" + b"x" * 100 + b"PAR1"):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.parquet"):
            read_candidates(dataset, tmp_path / "bad.parquet")


def test_a_file_whose_pages_are_broken_is_named(dataset, tmp_path):
    file = write(tmp_path, **GOOD)
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"given\.parquet"):
        read_candidates(dataset, file)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_keeps_the_candidates_of_the_users_that_it_ranks(
    tmp_path, world_size
):
    """Whatever pieces they come in."""
    users = 40
    dataset = write_dataset(
        tmp_path / "data",
        draw_histories(users),
        cuts=(7, 11, 20, 29),
        streams=4,
    )
    config = load_config(
        [], [f"data={dataset.folder}", "evaluation.batch_size=6"]
    )
    negatives = [["d0-1", "d0-2", "d0-3"][: user % 4] for user in range(users)]
    ids = [f"u{user}" for user in range(users)]
    everyone = read_candidates(
        dataset,
        write(
            tmp_path,
            user_id=ids,
            positive=["d0-0"] * users,
            negatives=negatives,
        ),
    )
    kept = {}
    for rank in range(world_size):
        collected = _CandidateCollector(
            Homes(dataset, world_size, config), rank
        )
        for user in range(users):
            rows = everyone[user][1]
            for part in (rows[:2], rows[2:]):
                collected.add(
                    np.full(len(part), user),
                    np.zeros(len(part), np.int64),
                    part,
                )
        found = collected.candidates()
        batches = RankingBatches(
            dataset, rank, world_size, config.evaluation, 8, "test", config.seed
        )
        steps = range(batches.plan.steps(0))
        assert set(found) == {
            int(user)
            for step in steps
            for user in batches.plan.users(0, step, rank)
        }
        assert found.longest == everyone.longest == 4
        kept |= {user: rows.tolist() for user, (_, rows) in found.items()}
    assert kept == {user: rows.tolist() for user, (_, rows) in everyone.items()}
    assert kept[3] == [0, 1, 2, 3] and everyone.rows_C.dtype == np.int32


def test_candidates_come_in_pieces_of_any_size(
    dataset, ranks, tmp_path, monkeypatch
):
    file = write(tmp_path, **GOOD)
    config = load_config([], [f"data={dataset.folder}"])
    whole = as_lists(read_candidates(dataset, file))
    monkeypatch.setattr(trainer.evaluation.candidate_files, "_BATCH", 2)
    assert (
        as_lists(read_candidates_of_rank(dataset, file, ranks, config)) == whole
    )


def step(users, domains, counts):
    rows = np.zeros(sum(counts), np.int64)
    query = build_query(
        np.zeros(0, np.int64), np.zeros(len(users), np.int64), 4, rows
    )
    return Candidates(
        query,
        np.array(users),
        np.array(domains),
        np.zeros(len(users), int),
        np.array(counts),
        rows,
    )


@pytest.mark.parametrize("name", ["out.parquet", "it's out.parquet"])
def test_results_are_one_file_in_the_order_of_the_users(
    dataset, ranks, tmp_path, name
):
    folder = tmp_path / "results"
    folder.mkdir()
    writer = ResultWriter(dataset, folder / name, ranks)
    writer.add(
        step([4, 1], [1, 0], [2, 3]),
        np.array([2, 1]),
        np.array([0.5, 1.5, 3, 2, 1], np.float64),
    )
    writer.add(
        step([-1], [0], [1]), np.array([1]), np.zeros(1)
    )  # a place that only keeps ranks in step
    writer.add(step([0], [1], [1]), np.array([1]), np.array([-0.25]))
    writer.finish()
    assert [path.name for path in folder.iterdir()] == [name]
    table = pq.read_table(folder / name)
    assert table.to_pylist() == [
        {"user_id": "u0", "domain": "domain 1", "rank": 1, "scores": [-0.25]},
        {"user_id": "u1", "domain": "domain 0", "rank": 1, "scores": [3, 2, 1]},
        {
            "user_id": "u4",
            "domain": "domain 1",
            "rank": 2,
            "scores": [0.5, 1.5],
        },
    ]
    assert table.schema.field("scores").type.value_type == pa.float32()


def test_no_user_gives_an_empty_table(dataset, ranks, tmp_path):
    writer = ResultWriter(dataset, tmp_path / "out.parquet", ranks)
    writer.finish()
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 0 and table.column_names == [
        "user_id",
        "domain",
        "rank",
        "scores",
    ]


def test_nothing_stays_of_results_that_were_given_up(dataset, ranks, tmp_path):
    before = sorted(tmp_path.iterdir())
    writer = ResultWriter(dataset, tmp_path / "out.parquet", ranks)
    writer.add(step([4], [1], [1]), np.array([1]), np.zeros(1))
    assert sorted(tmp_path.iterdir()) != before
    writer.discard()
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_stays_where_results_cannot_be_joined(dataset, ranks, tmp_path):
    writer = ResultWriter(dataset, tmp_path / "out.parquet", ranks)
    writer.add(step([4], [1], [1]), np.array([1]), np.zeros(1))
    (dataset.folder / "users.parquet").write_bytes(b"")
    before = {tmp_path / "data"}
    with pytest.raises(Exception, match=r"users\.parquet"):
        writer.finish()
    assert set(tmp_path.iterdir()) == before


def test_results_never_overwrite_and_need_a_folder(dataset, ranks, tmp_path):
    (tmp_path / "out.parquet").touch()
    with pytest.raises(InputError, match=r"out\.parquet: already exists"):
        ResultWriter(dataset, tmp_path / "out.parquet", ranks)
    with pytest.raises(InputError, match="nowhere"):
        ResultWriter(dataset, tmp_path / "nowhere" / "out.parquet", ranks)
    assert (tmp_path / "out.parquet").read_bytes() == b""
