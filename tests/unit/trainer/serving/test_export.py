"""An exported run against its model and table, in an environment that has only PyTorch, NumPy and safetensors."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.serving.export
from tests.helpers.runs import finished_run, rank_of_one, records_read_once
from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.config.serving import ExportConfig
from trainer.data.format.dataset import File
from trainer.errors import InputError
from trainer.evaluation.sampled import build_history_query
from trainer.serving.export import check_faiss, export_run

ALLOWED = ("torch", "numpy", "safetensors")
PROBE = """
import importlib.util, json, sys
from pathlib import Path
for name in ("torchrec", "fbgemm_gpu", "deepspeed", "pyarrow", "syncrec", "trainer", "embeddings"):
    assert importlib.util.find_spec(name) is None, name
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
from example import Recommender
recommender = Recommender(folder)
asked = json.load(sys.stdin)
print(json.dumps([recommender([tuple(event) for event in history], *others) for history, *others in asked]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks, records_read_once():
        yield finished_run(tmp_path_factory.mktemp("run"), ranks)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    export_run(run.folder, output, run.ranks, ExportConfig())
    return output


@pytest.fixture(scope="module")
def loaded(run):
    """config, dataset, model, and every row of M."""
    config, dataset = open_run(run.folder)
    trained = load_trained_model(run.folder, config, dataset, run.ranks)
    model = trained.model
    table = trained.table
    with torch.no_grad():
        return (
            config,
            dataset,
            model,
            table(torch.arange(dataset.num_embeddings)),
        )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python that finds the packages of ALLOWED, what these need, and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", root], check=True
    )
    (site,) = root.glob("lib/python*/site-packages")
    wanted, seen = list(ALLOWED), set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # needed on another system, or by an extra
        for top in {
            Path(file).parts[0]
            for file in package.files
            if Path(file).parts[0] not in ("..", "__pycache__")
        }:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
        needs = [
            need for need in package.requires or () if "extra ==" not in need
        ]
        wanted += [
            need.replace("[", " ")
            .replace(";", " ")
            .split()[0]
            .rstrip("<>=!~0123456789.,")
            for need in needs
        ]
    return root / "bin" / "python"


def answers(python, folder, asked):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON")
    }
    command = [python, "-c", PROBE, folder]
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ids_of(dataset, number):
    rows = pq.read_table(
        dataset.local(dataset.domains[number].vocabulary)
    ).sort_by("row")
    return rows["item_id"].to_pylist()


@pytest.fixture(scope="module")
def answered(bare, folder, loaded):
    """The bare Python's answers, of one process: to `histories_of` and to `unknown_of`."""
    asked, expected = histories_of(loaded)
    unknown = unknown_of(loaded)
    found = answers(bare, folder, [*asked, *unknown])
    return found[: len(asked)], expected, found[len(asked) :]


def histories_of(loaded):
    """Histories of many lengths, and the scores that the trainer's model gives."""
    config, dataset, model, table = loaded
    ids = [ids_of(dataset, number) for number in range(len(dataset.domains))]
    names = [domain.name for domain in dataset.domains]
    generator = np.random.default_rng(0)
    asked, expected = [], []
    for length in (0, 1, 2, 7, 8, 9, 30):  # max_length is 8
        numbers = generator.integers(0, len(names), length)
        events = [
            (int(d), int(generator.integers(0, len(ids[d])))) for d in numbers
        ]
        rows = np.array(
            [dataset.domains[d].start + place for d, place in events], np.int64
        )
        ticks, now = (
            np.sort(generator.choice([0, 3, 4, 60_000], length)),
            61_000,
        )  # times are ticks here
        given = (
            rows,
            ticks,
            np.array([length]),
            np.array([now]),
            config.model.max_length,
            np.zeros(0, np.int64),
            True,
        )
        query = build_history_query(dataset, *given)
        with torch.no_grad():
            y_DR = model(query, table[query.ids])[0]
        for number, domain in enumerate(dataset.domains):
            scores = (
                table[domain.start : domain.start + domain.items] @ y_DR[number]
            ).numpy()
            left = [
                place
                for place in range(domain.items)
                if (number, place) not in events
            ]
            best = sorted(left, key=lambda place: -scores[place])
            history = [
                (int(tick), names[d], str(ids[d][place]))
                for tick, (d, place) in zip(ticks, events, strict=True)
            ]
            asked.append((history, names[number], 1000, now))
            expected.append(
                [
                    (str(ids[number][place]), float(scores[place]))
                    for place in best
                ]
            )
    return asked, expected


def unknown_of(loaded):
    """Histories with what the model does not know, without it, and none."""
    dataset = loaded[1]
    name, item = dataset.domains[0].name, str(ids_of(dataset, 0)[2])
    unknown = [
        (1, name, "no such item"),
        (2, "no such domain", item),
        (3, name, item),
        (4, name, ""),
    ]
    return [
        (unknown, name, 3),
        ([(3, name, item)], name, 3),
        ([], name, 3),
        ([(5, "?", "?")], name, 3),
    ]


@pytest.mark.ranks
def test_a_bare_environment_gives_the_trainers_scores(answered):
    answers_found, expected, _ = answered
    for found, wanted in zip(answers_found, expected, strict=True):
        assert dict(map(tuple, found)) == pytest.approx(dict(wanted), abs=1e-5)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.ranks
def test_what_the_model_does_not_know_is_left_out(answered, loaded):
    item = str(ids_of(loaded[1], 0)[2])
    with_unknown, without, new, nobody = answered[2]
    assert with_unknown == without and item not in [
        found for found, _ in without
    ]
    assert new == nobody and len(new) == 3


@pytest.mark.ranks
def test_the_example_is_a_command(folder, loaded):
    name, items = loaded[1].domains[1].name, loaded[1].domains[1].items

    def run(*arguments):
        return subprocess.run(
            [sys.executable, folder / "example.py", *arguments],
            capture_output=True,
            text=True,
        )

    known = ids_of(loaded[1], 1)[0]
    lines = run(name, "99", f"17:{name}:{known}").stdout.splitlines()
    assert len(lines) == items - 1 and all(
        len(line.split("\t")) == 2 for line in lines
    )
    assert run("nowhere", "3").stderr.startswith(
        "error: there is no domain 'nowhere'"
    )


def test_vectors_and_ids_are_the_tables_and_the_vocabularys(folder, loaded):
    _, dataset, _, table = loaded
    schema = json.loads((folder / "schema.json").read_text())
    there = {path.name for path in folder.iterdir()} - {
        "__pycache__"
    }  # another test imports example.py
    assert there == {
        "schema.json",
        "encoder.pt2",
        "example.py",
        "domain-0",
        "domain-1",
    }
    for domain, facts in zip(dataset.domains, schema["domains"], strict=True):
        assert (facts["name"], facts["items"], facts["id_type"]) == (
            domain.name,
            domain.items,
            "string",
        )
        items = np.load(folder / facts["folder"] / "items.npy")
        np.testing.assert_array_equal(
            items, table[domain.start : domain.start + domain.items]
        )
    for name, facts in schema["files"].items():
        assert File(name, **facts) == File.of(folder, name)


@pytest.fixture
def program(monkeypatch):
    """Encoders are so many bytes, and none: what is in one is not asked here."""

    def set_bytes(count):
        module = trainer.serving.export
        monkeypatch.setattr(module, "export_program", lambda encoder: count)
        monkeypatch.setattr(module, "plain_program", lambda file: None)
        monkeypatch.setattr(
            torch.export, "save", lambda count, file: file.write(bytes(count))
        )

    return set_bytes


def test_blocks_of_any_size_give_the_same_items(
    run, folder, tmp_path, monkeypatch, program
):
    program(100)
    monkeypatch.setattr(trainer.serving.export, "_BLOCK", 2)
    export_run(run.folder, tmp_path / "out", run.ranks, ExportConfig("fp16"))
    for file in folder.glob("domain-*/items.npy"):
        half = np.load(tmp_path / "out" / file.relative_to(folder))
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, np.load(file).astype(np.float16))


def test_an_export_that_fails_leaves_nothing(
    run, tmp_path, monkeypatch, program
):
    program(100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(
        InputError, match=r"\.out\.partial cannot be written \(No space left"
    ):
        export_run(run.folder, tmp_path / "out", run.ranks, ExportConfig())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "room", [100, 20_000]
)  # of the item vectors, of the encoder: bytes of a file
def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, room, program):
    program(30_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(InputError, match="cannot be written"):
            export_run(run.folder, tmp_path / "out", run.ranks, ExportConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="is there already"):
        export_run(run.folder, tmp_path, run.ranks, ExportConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_has_no_exported_form_is_refused_at_once(run, tmp_path):
    settings = (run.folder / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(
        settings.replace("encoder: transformer", "encoder: gru")
    )
    with pytest.raises(
        InputError,
        match=r"model\.encoder is gru: only transformer can be exported",
    ):
        export_run(tmp_path, tmp_path / "out", run.ranks, ExportConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_types_other_than_fp32_and_fp16_are_refused():
    with pytest.raises(InputError, match="give fp32 or fp16"):
        ExportConfig("int8")


@pytest.mark.skipif(
    importlib.util.find_spec("faiss") is not None, reason="FAISS is here"
)
def test_an_index_without_faiss_is_refused_at_once():
    with pytest.raises(InputError, match="pip install"):
        export_run("nowhere", "out", None, ExportConfig(faiss="Flat"))


def test_an_index_finds_the_items_with_the_greatest_scores(
    run, loaded, tmp_path
):
    faiss = pytest.importorskip("faiss", reason="FAISS is an extra")
    export_run(
        run.folder, tmp_path / "out", run.ranks, ExportConfig(faiss="Flat")
    )
    items = np.load(tmp_path / "out" / "domain-0" / "items.npy")
    index = faiss.read_index(str(tmp_path / "out" / "domain-0" / "index.faiss"))
    user = (
        np.random.default_rng(0)
        .standard_normal((1, items.shape[1]))
        .astype(np.float32)
    )
    assert (
        index.search(user, 3)[1][0].tolist()
        == np.argsort(-(items @ user[0]))[:3].tolist()
    )
    with pytest.raises(InputError, match="knows no such index"):
        check_faiss(ExportConfig(faiss="Nonsense7"))
