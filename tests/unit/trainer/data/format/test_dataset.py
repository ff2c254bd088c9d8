import dataclasses
import json
import shutil

import numpy as np
import pytest

import syncrec.layers.time_encoding
from trainer.data.format.dataset import (
    FORMAT_VERSION,
    LENGTHS,
    LENGTHS_DTYPE,
    TICKS,
    USERS,
    Dataset,
    Domain,
    File,
    Shard,
)
from trainer.errors import InputError


@pytest.fixture
def dataset(tmp_path):
    """A folder whose facts add up; the tars themselves are not looked into here."""
    folder = tmp_path / "dataset"
    (folder / "shards").mkdir(parents=True)
    (folder / "vocabulary").mkdir()
    (folder / USERS).write_bytes(b"users")
    np.save(folder / LENGTHS, np.arange(10).reshape(5, 2).astype(LENGTHS_DTYPE))
    shards, domains = [], []
    for number, (first, users, interactions) in enumerate(
        [(0, 3, 10), (3, 2, 5)]
    ):
        name = f"shards/{number:06d}.tar"
        (folder / name).write_bytes(b"x" * 7)
        shards.append(Shard(name, users, first, interactions, 7, "0" * 64))
    for number, (start, items, room) in enumerate(
        [(0, 4, 68), (68, 1000, 1100)]
    ):
        name = f"vocabulary/{number}.parquet"
        (folder / name).write_bytes(b"vocabulary %d" % number)
        domains.append(
            Domain(
                f"дом{number}",
                start,
                items,
                room,
                5,
                7,
                {"p50": 2, "max": 9},
                name,
            )
        )
    files = tuple(
        File.of(folder, name)
        for name in (USERS, LENGTHS, *(domain.vocabulary for domain in domains))
    )
    made = Dataset(
        folder,
        3,
        5,
        15,
        1,
        9,
        100.0,
        1e6,
        1024,
        2,
        tuple(domains),
        tuple(shards),
        files,
        tie_order="hash",
        tied_users=1,
        time_kind="numbers",
        time_unit="s",
    )
    made.save()
    return made


def edit(dataset, change):
    path = dataset.folder / "dataset.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_load_gives_back_what_was_saved(dataset):
    assert Dataset.load(str(dataset.folder)) == dataset


def test_lengths_are_those_of_the_file_and_not_read_into_memory(dataset):
    assert (
        dataset.lengths.dtype == LENGTHS_DTYPE
        and dataset.lengths.tolist() == np.arange(10).reshape(5, 2).tolist()
    )
    assert (
        isinstance(dataset.lengths, np.memmap)
        and not dataset.lengths.flags.writeable
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: np.save(path, np.zeros((5, 3), LENGTHS_DTYPE)),
        lambda path: np.save(path, np.zeros((4, 2), LENGTHS_DTYPE)),
        lambda path: np.save(path, np.zeros((5, 2), np.int32)),
        lambda path: np.save(path, np.array([[{}] * 2] * 5), allow_pickle=True),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_lengths_that_are_none_are_refused(dataset, spoil):
    spoil(dataset.folder / LENGTHS)
    with pytest.raises(
        InputError, match=r"lengths\.npy .*prepare the dataset again"
    ):
        _ = dataset.lengths


def test_a_changed_file_is_named(dataset):
    for file in dataset.files:
        path = dataset.folder / file.name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(
            InputError,
            match=rf"{file.name}: its sha256 is not the one in dataset\.json",
        ):
            Dataset.load(dataset.folder)
        path.write_bytes(content + b"x")
        with pytest.raises(
            InputError,
            match=rf"{file.name} has {len(content) + 1} bytes, dataset\.json says {len(content)}",
        ):
            Dataset.load(dataset.folder)
        path.write_bytes(content)
    assert Dataset.load(dataset.folder) == dataset


def test_domains_tile_the_rows(dataset):
    assert dataset.num_embeddings == 1168
    assert dataset.starts.dtype == np.int64 and dataset.starts.tolist() == [
        0,
        68,
    ]
    domains = dataset.domain_of(np.array([[0, 67], [68, 1167]], dtype=np.int32))
    assert domains.dtype == np.int64 and domains.tolist() == [[0, 0], [1, 1]]


def test_ticks_divide_the_time_of_the_logs_and_end_where_it_does(dataset):
    span = dataset.last_time - dataset.first_time
    given = [
        dataset.first_time + share * span
        for share in (0, 1e-6, 0.5, 1 - 1e-9, 1, 7, -1)
    ]
    ticks = dataset.ticks(given)
    assert ticks.dtype == np.uint16 and ticks.tolist() == [
        0,
        0,
        32767,
        65534,
        65535,
        65535,
        0,
    ]
    assert dataclasses.replace(dataset, last_time=dataset.first_time).ticks(
        [dataset.first_time]
    ).tolist() == [0]
    assert TICKS == syncrec.layers.time_encoding.TICKS


def test_fingerprint_follows_the_contents_and_not_the_place(dataset, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(dataset.folder, moved)
    assert Dataset.load(moved).fingerprint == dataset.fingerprint
    assert (
        dataclasses.replace(dataset, seed=4).fingerprint != dataset.fingerprint
    )


def fields(cls, *but):
    return [
        field.name for field in dataclasses.fields(cls) if field.name not in but
    ]


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ((), name)
        for name in fields(Dataset, "folder", "cache", "split", "training")
    ]
    + [(("domains", 0), name) for name in fields(Domain)]
    + [(("shards", 1), name) for name in fields(Shard)]
    + [(("files", 1), name) for name in fields(File)],
)
@pytest.mark.parametrize("value", ["missing", None, True])
def test_a_field_missing_or_of_another_type_is_named(
    dataset, where, field, value
):
    def change(facts):
        for step in where:
            facts = facts[step]
        if value == "missing":
            del facts[field]
        else:
            facts[field] = value

    edit(dataset, change)
    with pytest.raises(InputError, match=field) as error:
        Dataset.load(dataset.folder)
    assert "dataset.json" in str(
        error.value
    ) and "prepare the dataset again" in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda facts: facts.update(format_version=FORMAT_VERSION + 41),
            [str(FORMAT_VERSION + 41), str(FORMAT_VERSION)],
        ),
        (lambda facts: facts.pop("format_version"), ["None"]),
        (lambda facts: facts.update(users=6), ["add up"]),
        (lambda facts: facts.update(interactions=16), ["add up"]),
        (lambda facts: facts.update(shards=[]), ["add up"]),
        (lambda facts: facts.update(domains=[]), ["add up"]),
        (lambda facts: facts["domains"][1].update(start=67), ["add up"]),
        (lambda facts: facts["shards"][1].update(first_user=4), ["add up"]),
        (lambda facts: facts.update(colour="red"), ["colour"]),
        (lambda facts: facts["shards"].append("x"), ["Shard", "'x'"]),
        (lambda facts: facts["files"].append("x"), ["File", "'x'"]),
        (
            lambda facts: facts["files"].pop(),
            ["the files it names are not those of a dataset"],
        ),
        (
            lambda facts: facts["files"].append(facts["files"][0]),
            ["the files it names are not those of a dataset"],
        ),
        (
            lambda facts: facts["files"][0].update(name="others.parquet"),
            ["the files it names are not those of a dataset"],
        ),
        (lambda facts: facts.update(block_users=0), ["0 users a block"]),
        (lambda facts: facts.update(streams=0), ["0 streams for 5 users"]),
        (lambda facts: facts.update(streams=6), ["6 streams for 5 users"]),
        (lambda facts: facts["domains"][1].update(items=1101), ["add up"]),
        (lambda facts: facts["domains"][0].update(items=0), ["add up"]),
        (lambda facts: facts["domains"][1].update(room=2**31), ["int32"]),
        (
            lambda facts: (
                facts.update(users=2**40),
                facts["shards"][1].update(users=2**40 - 3),
            ),
            ["int32"],
        ),
    ],
)
def test_contents_that_cannot_be_used_are_refused(dataset, change, named):
    edit(dataset, change)
    with pytest.raises(InputError) as error:
        Dataset.load(dataset.folder)
    assert all(
        word in str(error.value)
        for word in [*named, "prepare the dataset again"]
    )


OUTSIDE = [
    "/etc/passwd",
    "../other/1.tar",
    "shards/../../1.tar",
    "..",
    "",
    ".",
    "shards/\x1b[31m.tar",
    "a\0b",
    "a\nb",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    ("where", "field"),
    [("shards", "name"), ("domains", "vocabulary"), ("files", "name")],
)
def test_a_name_that_leads_out_of_the_folder_is_refused(
    dataset, where, field, name
):
    edit(dataset, lambda facts: facts[where][1].update({field: name}))
    for check_shards in (True, False):
        with pytest.raises(
            InputError, match="is no name of a file in this folder"
        ) as error:
            Dataset.load(dataset.folder, check_shards)
        assert repr(name) in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_unreadable_json_is_refused(dataset, text):
    (dataset.folder / "dataset.json").write_text(text)
    with pytest.raises(
        InputError, match=r"dataset\.json.*prepare the dataset again"
    ):
        Dataset.load(dataset.folder)


@pytest.mark.parametrize(
    "name",
    [
        "shards/000001.tar",
        "vocabulary/1.parquet",
        "users.parquet",
        "lengths.npy",
    ],
)
def test_a_missing_file_is_named(dataset, name):
    (dataset.folder / name).unlink()
    with pytest.raises(InputError, match=name):
        Dataset.load(dataset.folder)


def test_a_shard_cut_short_is_named_with_both_sizes(dataset):
    (dataset.folder / "shards/000000.tar").write_bytes(b"x" * 5)
    with pytest.raises(InputError, match=r"000000\.tar has 5 bytes.*7"):
        Dataset.load(dataset.folder)


def test_damaged_shards_are_let_through_where_they_are_to_be_skipped(dataset):
    (dataset.folder / "shards/000000.tar").write_bytes(b"x" * 5)
    assert Dataset.load(dataset.folder, check_shards=False) == dataset
    (dataset.folder / "shards/000001.tar").unlink()
    assert Dataset.load(dataset.folder, check_shards=False) == dataset
    (dataset.folder / "shards/000000.tar").unlink()
    with pytest.raises(
        InputError, match=r"dataset\.json: not one of its 2 shards is there"
    ):
        Dataset.load(dataset.folder, check_shards=False)


def test_another_folder_is_no_dataset(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="not a dataset folder"):
            Dataset.load(folder)


def test_contents_are_compared_by_one_process_of_a_host_and_sizes_by_all(
    dataset,
):
    for file in dataset.files:
        path = dataset.folder / file.name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(InputError, match=rf"{file.name}: its sha256"):
            Dataset.load(dataset.folder)
        assert Dataset.load(dataset.folder, check_contents=False) == dataset
        path.write_bytes(content + b"x")
        for check_contents in (True, False):
            with pytest.raises(InputError, match=rf"{file.name} has \d+ bytes"):
                Dataset.load(dataset.folder, check_contents=check_contents)
        path.write_bytes(content)
