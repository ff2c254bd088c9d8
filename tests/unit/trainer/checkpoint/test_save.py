import errno
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import embeddings.checkpoint
import embeddings.placement
import trainer.checkpoint.load
import trainer.checkpoint.save
from embeddings.checkpoint import ShardCopy
from embeddings.config import TableConfig
from embeddings.table import ItemTable
from tests.helpers.rank_processes import run_alone
from tests.helpers.runs import (
    METRICS,
    SmallRun,
    best_of,
    edit_json,
    everything,
    same,
    seal,
    train,
)
from trainer.checkpoint.layout import (
    DamagedCheckpoint,
    RunState,
    list_checkpoints,
    read_state,
)
from trainer.checkpoint.load import (
    find_best,
    find_newest,
    read_table_ranges,
    restore_best,
    verify_checkpoint,
)
from trainer.config.checkpoint import CheckpointConfig
from trainer.errors import InputError
from trainer.run_files import BEST, DENSE, LATEST, MANIFEST, OPTIMIZER, STATE
from trainer.training.loader_memory import estimate_loader_bytes
from trainer.training.loop import describe_run

TABLE = "table-00000-of-00001.safetensors"
TAKEN_AWAY = [
    ("rename", "step-00000001"),
    ("rename", "step-00000002"),
    ("rename", "step-00000003"),
]
FILES = (STATE, DENSE, OPTIMIZER, TABLE, "metrics.jsonl")


@pytest.fixture(scope="module")
def interrupted():
    """What tests/helpers/interrupted.py finds."""
    memory = Path(
        "/dev/shm"
    )  # some ten thousand flushes to disk, which are not what is tested
    folder = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        done = run_alone("tests.helpers.interrupted", place, module=True)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((Path(place) / "found.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", ["a further step", "the same step"])
@pytest.mark.parametrize("how", ["kill", "torn", "full"])
def test_a_save_that_ends_at_any_write_leaves_a_whole_checkpoint_to_go_on_from(
    interrupted, scenario, how
):
    cases = [
        case
        for case in interrupted["cases"]
        if (case["scenario"], case["how"]) == (scenario, how)
    ]
    wrong = [
        f"{case['call']}: {case['wrong']}" for case in cases if case["wrong"]
    ]
    assert wrong == []
    kinds = {case["call"].split()[1] for case in cases}
    if (
        scenario == "a further step"
    ):  # nothing that writes went unseen, and both outcomes are there
        with_halves = {"save_file", "open"}
        assert kinds == (
            with_halves
            if how == "torn"
            else with_halves | {"mkdir", "fsync", "rename", "remove", "rmdir"}
        )
        # Nothing that needs room is written once the new checkpoint is seen.
        assert {case["step"] for case in cases} == (
            {2} if how == "torn" else {2, 3}
        )
    for case in cases:
        if how != "full":
            assert not case["passed"] and not case["error"], case
        elif case["error"]:
            assert (
                "\n" not in case["error"]
                and os.strerror(errno.ENOSPC) in case["error"]
            ), case
            assert re.search(
                r"step-00000003(-1)?\.partial: the checkpoint cannot be written",
                case["error"],
            ), case
        else:  # only what is taken away anyhow may fail unnoticed
            _, kind, name = case["call"].split()[:3]
            assert case["passed"] and (
                kind in ("remove", "rmdir") or (kind, name) in TAKEN_AWAY
            ), case


@pytest.mark.ranks
def test_a_disk_that_is_full_is_one_line_and_leaves_the_checkpoint_before(
    interrupted,
):
    if "no_disks" in interrupted:
        pytest.skip(interrupted["no_disks"])
    *small, enough = interrupted["disks"]
    assert (
        len(small) > 10
        and enough[1] == ""
        and enough[2]["step"] == 3
        and enough[3] == []
    )
    reasons = set()
    for _, error, state, said in small:
        assert (
            "\n" not in error
            and "the checkpoint cannot be written" in error
            and "No space left on device" in error
        )
        assert state["step"] == 2 and said == []
        reasons.add("serializing" in error)
    assert reasons == {True, False}  # met by safetensors, and by Python


@pytest.fixture(scope="module")
def pristine(group, tmp_path_factory):
    """A run with checkpoints of steps 1 and 2; what they hold, by step, as `expected`."""
    run = SmallRun(tmp_path_factory.mktemp("made"), group)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(METRICS)
    trainer, run.expected = run.trainer(), {}
    for state in (
        RunState(1, 1, best_of(1), 0, 3, 1.5),
        RunState(2, 1, best_of(1), 0, 4, 2.5),
    ):
        run.save(train(trainer, 1), state)
        run.expected[state.step] = everything(trainer)
    return run


@pytest.fixture
def run(pristine, tmp_path):
    """A copy, for one test."""
    return pristine.copied(tmp_path / "run")


def folders(run):
    return sorted(
        entry.name for entry in (run.folder / "checkpoints").iterdir()
    )


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(run):
    said = []
    folder, facts = find_newest(run.folder, run.ranks, said.append)
    assert said == [] and folder.name == "step-00000002"
    assert facts["state"] == RunState(2, 1, best_of(1), 0, 4, 2.5)
    assert facts["dataset"] == run.dataset.fingerprint
    resumed = run.trainer(folder, 2)
    assert same(everything(resumed), run.expected[2]) and not same(
        run.expected[1], run.expected[2]
    )
    straight, resumed = train(run.trainer(), 5), train(resumed, 3)
    assert same(everything(resumed), everything(straight))


def test_without_a_checkpoint_there_is_none(run, tmp_path):
    assert find_newest(tmp_path / "nowhere", run.ranks, pytest.fail) == (
        None,
        None,
    )


# Damage that is seen where checkpoints are looked for.


def flip(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def cut(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def link(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def as_folder(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


def unlisted(folder, name):
    (folder / name).unlink()
    seal(folder)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def manifest(**entries):
    return lambda folder: edit_json(folder / MANIFEST, **entries)


def file_entry(name, **changes):
    """Changes the manifest's entry of a file; None takes its key out."""

    def damage(folder):
        files = json.loads((folder / MANIFEST).read_text())["files"]
        files[name] = {
            key: value
            for key, value in (files.get(STATE) | changes).items()
            if value is not None
        }
        edit_json(folder / MANIFEST, files=files)

    return damage


def facts(**entries):
    """Changes state.json, and the manifest with it."""

    def damage(folder):
        edit_json(folder / STATE, **entries)
        seal(folder)

    return damage


def state(**entries):
    def damage(folder):
        content = json.loads((folder / STATE).read_text())["state"] | entries
        facts(
            state={
                key: value for key, value in content.items() if value is not ...
            }
        )(folder)

    return damage


def state_text(content):
    def damage(folder):
        (folder / STATE).write_bytes(content)
        seal(folder)

    return damage


def best(folder, **changes):
    return state(best=best_of(1, folder) | changes)


NESTED = b"[" * 200_000
NO_NAME = r"/manifest\.json names "
UNREADABLE = r"/manifest\.json is missing or unreadable"
NOT_OURS = r"/state\.json: its state is not this program's"
UNUSABLE = r"/state\.json cannot be used \("
SEEN = {
    f"{name} missing": (
        lambda folder, name=name: (folder / name).unlink(),
        f"/{name} is missing",
    )
    for name in FILES
}
SEEN |= {
    f"{name} cut": (
        lambda f, name=name: cut(f, name),
        rf"/{name} has \d+ bytes, the manifest says \d+",
    )
    for name in FILES
}
SEEN |= {
    f"{name} flipped": (
        lambda f, name=name: flip(f, name),
        f"/{name} has another checksum",
    )
    for name in FILES
}
SEEN |= {
    f"{name} a link": (
        lambda f, name=name: link(f, name),
        f"/{name} is no file",
    )
    for name in FILES
}
SEEN |= {
    f"{name} a folder": (
        lambda f, name=name: as_folder(f, name),
        f"/{name} is no file",
    )
    for name in FILES
}
SEEN |= {
    f"{name} in neither": (
        lambda folder, name=name: unlisted(folder, name),
        f"/{name} is missing, in the manifest too",
    )
    for name in FILES
    if name != TABLE
}
SEEN |= {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), UNREADABLE),
    "an empty manifest": (text(MANIFEST, b""), UNREADABLE),
    "a manifest cut": (lambda folder: cut(folder, MANIFEST), UNREADABLE),
    "a manifest that is no text": (text(MANIFEST, b"\xff\xfe\x00"), UNREADABLE),
    "a manifest that is a list": (text(MANIFEST, b"[]"), UNREADABLE),
    "a manifest that is a folder": (
        lambda folder: as_folder(folder, MANIFEST),
        UNREADABLE,
    ),
    "a deep manifest": (text(MANIFEST, NESTED), UNREADABLE),
    "a manifest of another version": (
        manifest(format_version=2),
        r"/manifest\.json has format_version 2, this .* reads 1",
    ),
    "a manifest without a version": (manifest(format_version=None), UNREADABLE),
    "a manifest without files": (manifest(files=None), UNREADABLE),
    "a manifest with a number of files": (manifest(files=7), UNREADABLE),
    "a manifest with a list of files": (
        manifest(files=["dense.safetensors"]),
        UNREADABLE,
    ),
    "an entry that is text": (manifest(files={STATE: "12 bytes"}), UNREADABLE),
    "an entry without a size": (file_entry(STATE, bytes=None), UNREADABLE),
    "an entry without a checksum": (
        file_entry(STATE, xxh3_128=None),
        UNREADABLE,
    ),
    "a size in words": (file_entry(STATE, bytes="many"), UNREADABLE),
    "a size without end": (file_entry(STATE, bytes=float("inf")), UNREADABLE),
    "a size below 0": (
        file_entry(STATE, bytes=-1),
        r"/state\.json has \d+ bytes, the manifest says -1",
    ),
    "a checksum that is a number": (
        file_entry(STATE, xxh3_128=5),
        r"/state\.json has another checksum",
    ),
    "a name that leads out": (
        file_entry("../step-00000001/state.json"),
        NO_NAME + "'../step-00000001/state.json', which",
    ),
    "an absolute name": (
        file_entry("/etc/hostname"),
        NO_NAME + "'/etc/hostname', which is no file of a checkpoint",
    ),
    "a name with a detour": (
        file_entry("./state.json"),
        NO_NAME + "'./state.json', which is no file of a checkpoint",
    ),
    "the folder above": (
        file_entry(".."),
        NO_NAME + "'..', which is no file of a checkpoint",
    ),
    "no name": (
        file_entry(""),
        NO_NAME + "'', which is no file of a checkpoint",
    ),
    "the manifest itself": (
        file_entry(MANIFEST),
        NO_NAME + "'manifest.json', which is no file of a checkpoint",
    ),
    "state.json not JSON": (state_text(b"{"), UNUSABLE),
    "state.json no text": (state_text(b"\xff\xfe\x00"), UNUSABLE),
    "a deep state.json": (state_text(NESTED), UNUSABLE),
    "state.json a list": (state_text(b"[]"), UNUSABLE),
    "state.json of another version": (
        facts(format_version=3),
        r"/state\.json has format_version 3, this program goes on from 2",
    ),
    "state.json without a version": (facts(format_version=None), UNUSABLE),
    "no state": (facts(state=None), UNUSABLE),
    "a state that is a list": (facts(state=[1, 2]), UNUSABLE),
    "a state with a key less": (state(step=...), NOT_OURS),
    "a state with a key more": (state(extra=1), NOT_OURS),
    "a step in words": (state(step="2"), NOT_OURS),
    "half a step": (state(step=2.5), NOT_OURS),
    "no step": (state(step=None), NOT_OURS),
    "a step below 0": (
        state(step=-1),
        r"/state\.json: its state has negative counts",
    ),
    "seconds below 0": (
        state(seconds=-0.5),
        "/state.json: its state has negative counts",
    ),
    "a best that is text": (state(best="step-00000001"), NOT_OURS),
    "a best without folder": (state(best={"step": 1}), UNUSABLE),
    "a best without step": (
        state(best={"folder": "checkpoints/step-00000001"}),
        UNUSABLE,
    ),
    "a best without its value": (
        state(
            best={"folder": "checkpoints/step-00000001", "step": 1, "epoch": 0}
        ),
        "/state.json",
    ),
    "a best outside": (
        best("checkpoints/../../x"),
        UNUSABLE + r"checkpoints/\.\./\.\./x is no checkpoint's name",
    ),
    "a best above": (best("../run/checkpoints/step-00000001"), UNUSABLE),
    "a best at an absolute place": (best("/etc"), UNUSABLE),
    "a best that goes on outside": (
        best("checkpoints/step-00000001/../../.."),
        UNUSABLE,
    ),
    "a best with a numbered folder": (best(7), UNUSABLE),
    "a best with a step in words": (best(None, step="1"), UNUSABLE),
    "no configuration": (facts(config=None), UNUSABLE),
    "a configuration in words": (
        facts(config="seed=0"),
        "/state.json: its configuration or dataset is missing",
    ),
    "a numbered dataset": (
        facts(dataset=12),
        "/state.json: its configuration or dataset is missing",
    ),
}


@pytest.mark.parametrize(("damage", "message"), SEEN.values(), ids=SEEN)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    run, damage, message
):
    last, before = list_checkpoints(run.folder)
    damage(last)
    said = []
    folder, found = find_newest(run.folder, run.ranks, said.append)
    assert folder == before and found["state"].step == 1
    (line,) = said
    assert "\n" not in line and re.search(
        rf"^{re.escape(str(last))}{message}.*: this checkpoint is skipped$",
        line,
    ), line


@pytest.mark.parametrize(
    "name", ["notes.txt", ".nfs0000001", "table-00001-of-00002.safetensors"]
)
def test_a_file_that_the_manifest_does_not_name_is_nobodys(run, name):
    """A listing is no reason to skip a whole checkpoint, and what is loaded is what the manifest
    names."""
    folder = list_checkpoints(run.folder)[0]
    (folder / name).write_bytes(b"of somebody else")
    (folder / "more").mkdir()
    assert find_newest(run.folder, run.ranks, pytest.fail)[0] == folder
    assert same(everything(run.trainer(folder, 2)), run.expected[2])


def test_a_checkpoint_that_no_listing_shows_is_found_by_its_name(
    run, monkeypatch
):
    """As on a host whose listing is from before it was written."""
    run.save(
        train(run.trainer(list_checkpoints(run.folder)[0], 2), 1),
        RunState(3, 1, best_of(1)),
    )
    assert json.loads((run.folder / LATEST).read_text()) == {
        "folder": "checkpoints/step-00000003"
    }
    for module in (trainer.checkpoint.load, trainer.checkpoint.save):
        monkeypatch.setattr(
            module, "list_checkpoints", lambda run: list_checkpoints(run)[1:]
        )
    folder, facts = find_newest(run.folder, run.ranks, pytest.fail)
    assert folder.name == "step-00000003" and facts["state"].step == 3
    writer = run.checkpoints(last=facts["state"])
    given = RunState(3, 3, best_of(1))
    writer.save(
        run.trainer(folder, 3).engine, run.trainer(folder, 3).table, given
    )
    writer.finish()
    assert {"step-00000003", "step-00000003-1"} <= set(
        folders(run)
    )  # it is not written over either


NO_POINTERS = [
    "{",
    "[]",
    '{"folder": 7}',
    '{"folder": "checkpoints/../../x"}',
    '{"folder": "/etc"}',
    "[" * 200_000,
]


@pytest.mark.parametrize(
    "content", NO_POINTERS, ids=lambda content: content[:40]
)
def test_a_pointer_that_is_none_is_no_matter(run, content):
    (run.folder / LATEST).write_text(content)
    assert (
        find_newest(run.folder, run.ranks, pytest.fail)[0].name
        == "step-00000002"
    )


def test_a_pointer_to_a_checkpoint_that_was_taken_away_is_told(run):
    shutil.rmtree(list_checkpoints(run.folder)[0])
    said = []
    assert (
        find_newest(run.folder, run.ranks, said.append)[0].name
        == "step-00000001"
    )
    assert (
        len(said) == 1
        and "step-00000002/manifest.json is missing or unreadable" in said[0]
    )


def test_the_table_of_damages_starts_from_a_whole_checkpoint(run):
    folder = list_checkpoints(run.folder)[0]
    seal(folder)
    assert find_newest(run.folder, run.ranks, pytest.fail)[0] == folder
    state()(folder)
    file_entry(STATE)(folder)
    assert find_newest(run.folder, run.ranks, pytest.fail)[0] == folder


def test_where_all_are_damaged_none_is_found_and_each_is_named(run):
    for folder in list_checkpoints(run.folder):
        flip(folder, DENSE)
    said = []
    assert find_newest(run.folder, run.ranks, said.append) == (None, None)
    assert [
        Path(line.split(":")[0].split(" ")[0]).parent.name for line in said
    ] == [
        "step-00000002",
        "step-00000001",
    ]


def test_ranks_share_the_checksums(run):
    """All of them see names and sizes; each file's content is read by one rank."""
    folder = list_checkpoints(run.folder)[0]
    for name in FILES:
        flip(folder, name)
        blamed = []
        for rank in range(3):
            try:
                verify_checkpoint(folder, rank, 3)
            except DamagedCheckpoint as error:
                blamed.append(str(error))
        assert blamed == [
            f"{folder / name} has another checksum than the manifest says"
        ]
        flip(folder, name)
    cut(folder, DENSE)
    for rank in range(3):
        with pytest.raises(
            DamagedCheckpoint, match=r"dense\.safetensors has \d+ bytes"
        ):
            verify_checkpoint(folder, rank, 3)


# What a valid checksum hides is refused where it is loaded.


class Planted:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(name):
    return lambda folder: (folder / name).write_bytes(
        pickle.dumps(Planted(folder.parents[2] / "mark"))
    )


def torch_pickled(name):
    def damage(folder):
        stream = io.BytesIO()
        torch.save({"weight": Planted(folder.parents[2] / "mark")}, stream)
        (folder / name).write_bytes(stream.getvalue())

    return damage


def with_header(name, change):
    """The file with another header, the tensors' bytes as they were."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = change(json.loads(content[8 : 8 + length]))
        header = (
            header if isinstance(header, bytes) else json.dumps(header).encode()
        )
        (folder / name).write_bytes(
            struct.pack("<Q", len(header)) + header + content[8 + length :]
        )

    return damage


def grown(header):
    """Claims rows that the file does not hold."""
    name = next(name for name in header if name != "__metadata__")
    entry = header[name]
    first, last = entry["data_offsets"]
    grown = {
        "shape": [1000 * entry["shape"][0], *entry["shape"][1:]],
        "data_offsets": [first, first + 1000 * (last - first)],
    }
    return header | {name: entry | grown}


def renamed(header):
    name = next(name for name in header if name != "__metadata__")
    return {
        ("other" if key == name else key): value
        for key, value in header.items()
    }


def with_facts(**changes):
    def change(header):
        given = header["__metadata__"] | changes
        return header | {
            "__metadata__": {
                key: value for key, value in given.items() if value is not None
            }
        }

    return with_header(TABLE, change)


def tensors(name, change):
    """The tensors of a file changed, its metadata kept out."""
    return lambda folder: save_file(
        change(load_file(folder / name)), folder / name
    )


def without_one(values):
    return dict(list(values.items())[1:])


def doubled(values):
    return {
        name: torch.cat([value, value]) if value.dim() else value
        for name, value in values.items()
    }


def of_table(rows=None, dim=8, **options):
    """Another table's file in its place."""

    def damage(folder):
        dataset = folder.parents[2] / "rows"
        other = ItemTable(
            rows or int(dataset.read_text()),
            dim,
            TableConfig(**options),
            0,
            "cpu",
        )
        ShardCopy(other).write(folder)

    return damage


DOES_NOT_FIT = r"its weights do not fit the run's model and dataset \("
NOT_READ = r"cannot be read \(.*\): copy the run again"
LOADED = {
    f"{name} a pickle": (pickled(name), NOT_READ)
    for name in (DENSE, OPTIMIZER, TABLE)
}
LOADED |= {
    f"{name} a pickle of torch's": (torch_pickled(name), NOT_READ)
    for name in (DENSE, OPTIMIZER, TABLE)
}
LOADED |= {
    f"{name} claims more": (with_header(name, grown), NOT_READ)
    for name in (DENSE, OPTIMIZER, TABLE)
}
LOADED |= {
    f"{name} empty": (text(name, b""), NOT_READ)
    for name in (DENSE, OPTIMIZER, TABLE)
}
LOADED |= {
    "a header without end": (
        text(DENSE, struct.pack("<Q", 2**62) + b"{}"),
        NOT_READ,
    ),
    "a header that is no JSON": (
        with_header(DENSE, lambda _: b"hello"),
        NOT_READ,
    ),
    "a deep header": (with_header(DENSE, lambda _: NESTED), NOT_READ),
    "a weight less": (
        tensors(DENSE, without_one),
        DOES_NOT_FIT + "Error.*Missing key",
    ),
    "a weight more": (
        tensors(DENSE, lambda values: values | {"more": torch.zeros(2)}),
        DOES_NOT_FIT + ".*Unexpected key",
    ),
    "weights of another width": (
        tensors(DENSE, doubled),
        DOES_NOT_FIT + ".*size mismatch",
    ),
    "a renamed weight": (with_header(DENSE, renamed), DOES_NOT_FIT),
    "an optimizer without step": (
        tensors(
            OPTIMIZER,
            lambda values: {
                name: value for name, value in values.items() if name != "step"
            },
        ),
        DOES_NOT_FIT + "'step'",
    ),
    "an optimizer without a moment": (
        tensors(OPTIMIZER, without_one),
        DOES_NOT_FIT,
    ),
    "an optimizer of another width": (
        tensors(OPTIMIZER, doubled),
        DOES_NOT_FIT,
    ),
    "a table of more rows": (
        of_table(rows=500),
        DOES_NOT_FIT + ".*holds a table of 500 rows, this one has",
    ),
    "a table of other width": (
        of_table(dim=16),
        DOES_NOT_FIT + r".*is \[\d+, 16\], this table has rows of \[8\]",
    ),
    "a table without momentum": (
        of_table(optimizer="sgd"),
        DOES_NOT_FIT + ".*lacks the optimizer's momentum1",
    ),
    "a table of adagrad": (
        of_table(optimizer="adagrad"),
        DOES_NOT_FIT + r".*momentum1 is \[\d+, 8\], .* rows of \[\]",
    ),
    "a table without facts": (
        tensors(TABLE, lambda values: values),
        DOES_NOT_FIT + ".*holds a table of None rows",
    ),
    "a table that begins nowhere": (
        with_facts(first_stored_row=None),
        DOES_NOT_FIT,
    ),
    "a table that begins in words": (
        with_facts(first_stored_row="first"),
        DOES_NOT_FIT,
    ),
    "a table that begins later": (
        with_facts(first_stored_row="2"),
        DOES_NOT_FIT + r".*table files hold \d+ of the \d+ rows",
    ),
    "a table that never stepped": (with_facts(updates=None), DOES_NOT_FIT),
    "a table scattered otherwise": (with_facts(scatter_step="1"), DOES_NOT_FIT),
    "no table": (
        lambda folder: (folder / TABLE).unlink(),
        DOES_NOT_FIT + ".*table files hold 0 of the",
    ),
    "another file of the table": (
        lambda f: (f / TABLE).rename(f / "table.safetensors"),
        DOES_NOT_FIT + ".*hold 0 of the",
    ),
}


@pytest.mark.parametrize(("damage", "message"), LOADED.values(), ids=LOADED)
def test_what_a_checksum_does_not_show_is_one_line_where_it_is_loaded(
    run, tmp_path, damage, message
):
    folder = list_checkpoints(run.folder)[0]
    (tmp_path / "rows").write_text(str(run.dataset.num_embeddings))
    damage(folder)
    seal(folder)
    assert find_newest(run.folder, run.ranks, pytest.fail)[0] == folder
    with pytest.raises(InputError) as error:
        run.trainer(folder, 2)
    line = str(error.value)
    assert "\n" not in line and re.search(
        rf"^{re.escape(str(folder))}: {message}", line
    ), line
    assert not (tmp_path / "mark").exists()


def test_a_planted_pickle_would_leave_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


# The best model, for evaluation.


def test_the_manifest_says_which_rows_a_table_file_has(run, tmp_path):
    """One that was written before it said so is read all the same."""
    folder = run.save(train(run.trainer(), 1), RunState(step=1))
    rows = run.dataset.num_embeddings
    assert read_table_ranges(folder) == {TABLE: (0, rows)}
    shutil.copytree(folder, tmp_path / "older")
    seal(tmp_path / "older")
    assert read_table_ranges(tmp_path / "older") == {TABLE: None}
    assert same(
        everything(run.trainer(folder, 1)),
        everything(run.trainer(tmp_path / "older", 1)),
    )


def test_without_room_for_a_copy_the_table_itself_is_written(run, monkeypatch):
    """Training waits for it: when `save` is over the checkpoint is there, with what a copy would have had."""
    trainer = train(run.trainer(), 2)
    needed = trainer.table.capacity.host + estimate_loader_bytes(
        run.config, run.dataset, 1
    )
    monkeypatch.setattr(
        embeddings.placement, "available_host_memory", lambda: needed + 200
    )
    monkeypatch.setattr(embeddings.placement, "PIECE", 100)
    monkeypatch.setattr(embeddings.checkpoint, "PIECE", 100)
    short = train(run.trainer(), 2)
    assert trainer.table.capacity.copied and not short.table.capacity.copied
    assert "training waits while a checkpoint is written" in describe_run(short)
    writer = run.checkpoints()
    writer.save(short.engine, short.table, RunState(step=99))
    assert (
        not writer.writing
        and list_checkpoints(run.folder)[0].name == "step-00000099"
    )
    saved = everything(short)
    train(short, 1)
    assert same(
        everything(run.trainer(list_checkpoints(run.folder)[0], 2)), saved
    )
    monkeypatch.setattr(
        embeddings.placement, "available_host_memory", lambda: needed + 99
    )
    with pytest.raises(
        InputError,
        match=r"a checkpoint takes 0\.1 kB of the host at least beside rows of",
    ):
        run.trainer()


def test_the_best_model_is_loaded_without_an_optimizer(run):
    trainer = run.trainer()
    table = ItemTable(
        run.dataset.num_embeddings, 8, TableConfig(optimizer="sgd"), 1, "cpu"
    )
    folder, best, facts = find_best(run.folder, run.ranks)
    assert best == best_of(1) and facts["state"].step == 1
    restore_best(folder, trainer.model, table)
    expected = run.expected[1]
    assert torch.equal(table.shard()[1]["weight"], expected["table weight"])
    found = {
        f"dense {name}": value
        for name, value in trainer.model.state_dict().items()
    }
    assert same(
        found,
        {
            name: value
            for name, value in expected.items()
            if name.startswith("dense ")
        },
    )


NO_MODEL = r"run: holds no finished model \(best\.json is missing or unreadable\): train first"
NO_BEST = {
    "none": (None, NO_MODEL),
    "not JSON": ("{", NO_MODEL),
    "a list": ("[]", NO_MODEL),
    "deep": (NESTED.decode(), NO_MODEL),
    "no text": (b"\xff\xfe\x00".decode("latin-1"), NO_MODEL),
    "outside": (json.dumps(best_of(1, "checkpoints/../../x")), NO_MODEL),
    "an absolute place": (json.dumps(best_of(1, "/etc")), NO_MODEL),
    "a numbered folder": (json.dumps(best_of(1, 7)), NO_MODEL),
    "no step": (json.dumps({"folder": "checkpoints/step-00000001"}), NO_MODEL),
    "no epoch": (
        json.dumps({"folder": "checkpoints/step-00000001", "step": 1}),
        NO_MODEL,
    ),
    "one that is gone": (
        json.dumps(best_of(7)),
        r"step-00000007/manifest\.json is missing or unreadable: copy the run again",
    ),
}


@pytest.mark.parametrize(("content", "message"), NO_BEST.values(), ids=NO_BEST)
def test_no_best_model_is_one_line(run, content, message):
    (run.folder / BEST).unlink()
    if content is not None:
        (run.folder / BEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        find_best(run.folder, run.ranks)
    assert "\n" not in str(error.value)


def test_a_best_model_that_is_damaged_is_one_line(run):
    flip(run.folder / "checkpoints/step-00000001", TABLE)
    with pytest.raises(
        InputError,
        match=rf"step-00000001/{TABLE} has another checksum .*: copy the run again$",
    ):
        find_best(run.folder, run.ranks)


# Which checkpoints stay.


def saves(run, keep, states):
    """Saves the same trainer at each of the states; what is in checkpoints/ after each."""
    trainer, writer, found = run.trainer(), run.checkpoints(keep), []
    for given in states:
        writer.save(trainer.engine, trainer.table, given)
        writer.finish()
        found.append([int(name.removeprefix("step-")) for name in folders(run)])
    return found


def test_the_newest_and_the_best_stay(run):
    states = [
        RunState(step, 0, best_of(4) if step > 3 else best_of(1))
        for step in range(3, 8)
    ]
    assert saves(run, 2, states) == [
        [1, 2, 3],
        [3, 4],
        [4, 5],
        [4, 5, 6],
        [4, 6, 7],
    ]
    assert json.loads((run.folder / BEST).read_text()) == best_of(4)
    assert (
        find_newest(run.folder, run.ranks, pytest.fail)[1]["state"]
        == states[-1]
    )


def test_the_best_stays_though_another_number_of_them_is_kept(run):
    assert saves(
        run, 1, [RunState(8, 0, best_of(2)), RunState(9, 9, best_of(9))]
    ) == [
        [2, 8],
        [9],
    ]


def test_what_is_not_ours_stays(run):
    place = run.folder / "checkpoints"
    foreign = [
        "notes.txt",
        "step-1",
        "step-00000001-copy",
        "step-00000001.backup",
        "step-00000001.tar",
        "old-step-00000001",
    ]
    for name in foreign:
        (place / name).mkdir() if "." not in name or name.endswith(
            "backup"
        ) else (place / name).write_text("mine")
        if (place / name).is_dir():
            (place / name / "mine").write_text("mine")
    for name in (
        "step-00000001.partial",
        "step-00000007.partial",
        "step-00000002.removed",
    ):
        (place / name).mkdir()
        (place / name / DENSE).write_text("left by a kill")
    trainer = run.trainer()
    run.save(trainer, RunState(9), keep=1)
    assert folders(run) == sorted([*foreign, "step-00000009"])
    assert all(
        (place / name / "mine").is_file() if (place / name).is_dir() else True
        for name in foreign
    )


def test_damaged_ones_of_later_steps_do_not_push_out_the_one_just_written(run):
    """A run that goes on from before a damaged checkpoint comes by other steps on its way there."""
    trainer = run.trainer()
    for step in (8, 9):
        flip(run.save(trainer, RunState(step), keep=9), DENSE)
    said = []
    folder, found = find_newest(run.folder, run.ranks, said.append)
    assert folder.name == "step-00000002" and len(said) == 2
    writer = run.checkpoints(keep=1, last=found["state"])
    writer.save(trainer.engine, trainer.table, RunState(5))
    writer.finish()
    folder, found = find_newest(run.folder, run.ranks, said.append)
    assert (
        folder is not None
        and folder.name == "step-00000005"
        and found["state"].step == 5
    )


def test_what_a_save_of_more_ranks_left_does_not_spoil_the_next(run):
    """Two ranks were killed at a step where one rank now writes."""
    left = run.folder / "checkpoints/step-00000003.partial"
    left.mkdir()
    (left / "table-00001-of-00002.safetensors").write_text("half")
    (left / "table-00000-of-00002.safetensors").write_text("whole")
    entry = {"table-00000-of-00002.safetensors": {"bytes": 5, "xxh3_128": "0"}}
    (left / "part-00001.json").write_text(json.dumps(entry))
    resumed = train(run.trainer(list_checkpoints(run.folder)[0], 2), 1)
    run.save(resumed, RunState(3))
    folder, _ = find_newest(run.folder, run.ranks, pytest.fail)
    assert folder.name == "step-00000003" and same(
        everything(run.trainer(folder, 3)), everything(resumed)
    )


def test_a_damaged_one_of_the_same_step_is_replaced(run):
    folder = list_checkpoints(run.folder)[0]
    resumed = run.trainer(folder, 2)
    flip(folder, DENSE)
    assert run.save(resumed, RunState(2, 1)) == folder
    assert find_newest(run.folder, run.ranks, pytest.fail)[1][
        "state"
    ] == RunState(2, 1)


def test_the_same_state_is_written_once(run):
    trainer, given = run.trainer(), RunState(5, 5, best_of(5), seconds=1.0)
    writer = run.checkpoints()
    writer.save(trainer.engine, trainer.table, given)
    writer.finish()
    written = read_state(run.folder / "checkpoints/step-00000005")
    given.seconds = 2.0  # time alone is no reason
    writer.save(trainer.engine, trainer.table, given)
    assert not writer.writing
    writer.finish()
    assert read_state(run.folder / "checkpoints/step-00000005") == written
    given.validated = 4
    writer.save(trainer.engine, trainer.table, given)
    writer.finish()
    assert (
        read_state(run.folder / "checkpoints/step-00000005-1")["state"] == given
    )
    before = folders(run)
    run.checkpoints(last=given).save(
        trainer.engine, trainer.table, given
    )  # the run that goes on from it
    assert folders(run) == before


# Writing while training goes on.


@pytest.fixture
def held_up(monkeypatch):
    """Every save is held up before its first file until the event is set; what was written, in order."""
    free, order, real = (
        threading.Event(),
        [],
        trainer.checkpoint.save.Checkpoints._write,
    )

    def write(self, *arguments):
        name = self._partial.name
        order.append(f"begins {name}")
        assert free.wait(60)
        real(self, *arguments)
        order.append(f"ends {name}")

    monkeypatch.setattr(trainer.checkpoint.save.Checkpoints, "_write", write)
    yield free, order
    free.set()


def test_later_steps_and_log_lines_are_not_in_it(run, held_up):
    free, _ = held_up
    resumed = train(run.trainer(list_checkpoints(run.folder)[0], 2), 1)
    expected, given = everything(resumed), RunState(3, 1, best_of(1))
    with open(run.folder / "metrics.jsonl", "a") as metrics:
        metrics.write("until here\n")
    writer = run.checkpoints()
    writer.save(resumed.engine, resumed.table, given)
    assert writer.writing
    train(resumed, 2)
    given.step, given.seconds, given.skipped_users = 5, 9.0, 7
    with open(run.folder / "metrics.jsonl", "a") as metrics:
        metrics.write("and on\n")
    assert not same(everything(resumed), expected)
    writer.settle(writer.writing)  # still written: nothing happens
    assert folders(run) == ["step-00000001", "step-00000002"]
    free.set()
    writer.finish()
    assert not writer.writing
    folder, found = find_newest(run.folder, run.ranks, pytest.fail)
    assert found["state"] == RunState(3, 1, best_of(1))
    assert (folder / "metrics.jsonl").read_text() == METRICS + "until here\n"
    assert same(everything(run.trainer(folder, 3)), expected)


def test_one_save_at_a_time(run, held_up):
    free, order = held_up
    trainer, writer = run.trainer(), run.checkpoints()
    writer.save(trainer.engine, trainer.table, RunState(5))
    threading.Timer(0.3, free.set).start()
    writer.save(trainer.engine, trainer.table, RunState(6))
    assert folders(run)[:2] == [
        "step-00000002",
        "step-00000005",
    ]  # made visible before the next begins
    writer.finish()
    names = ("step-00000005.partial", "step-00000006.partial")
    assert order == [
        f"{what} {name}" for name in names for what in ("begins", "ends")
    ]
    assert folders(run) == ["step-00000005", "step-00000006"]


def test_settling_makes_it_visible_between_two_steps(run):
    trainer, writer = run.trainer(), run.checkpoints()
    writer.settle(False)  # there is none
    writer.save(trainer.engine, trainer.table, RunState(5))
    writer._thread.join()
    assert not writer.writing and "step-00000005" not in folders(run)
    writer.settle(True)  # another rank writes still
    assert "step-00000005" not in folders(run)
    writer.settle(False)
    assert folders(run) == ["step-00000002", "step-00000005"]


def test_a_fault_of_the_program_is_no_full_disk(run, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by the test")

    monkeypatch.setattr(trainer.checkpoint.save, "save_file", broken)
    engine_of = run.trainer()
    with pytest.raises(ZeroDivisionError):
        run.save(engine_of, RunState(5))
    assert folders(run) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("every_steps", -1, "give 0 (never) or more"),
        ("every_minutes", -0.1, "give 0 (never) or more"),
        ("every_minutes", float("inf"), "give 0 (never) or more"),
        ("every_minutes", float("nan"), "give 0 (never) or more"),
        ("every_epochs", -1, "give 0 (never) or more"),
        ("keep", 0, "give at least 1"),
    ],
)
def test_bad_values_name_the_key(key, value, way_out):
    with pytest.raises(
        ValueError, match=rf"checkpoint\.{key} is {value}: {re.escape(way_out)}"
    ):
        CheckpointConfig(**{key: value})


def test_who_may_read_the_folder_may_read_its_files(run):
    trainer = run.trainer()
    writer = run.checkpoints()
    writer.save(trainer.engine, trainer.table, RunState(5, 5))
    writer.finish()
    folder = run.folder / "checkpoints/step-00000005"
    assert {
        file.stat().st_mode & 0o777 for file in folder.glob("*.safetensors")
    } == {folder.stat().st_mode & 0o666}
