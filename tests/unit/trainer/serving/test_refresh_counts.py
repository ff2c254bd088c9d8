"""Exports with the recency term, and counts that newer logs bring up to date, against the trainer's scores."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainer.serving.export
import trainer.serving.refresh_counts
from launch import export as export_script
from tests.helpers.made import ROOM, write_dataset
from tests.helpers.runs import finished_run, rank_of_one
from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.config.serving import ExportConfig, RefreshConfig
from trainer.data.format.dataset import Dataset, File, quantize_times
from trainer.data.loading.day_counts import count_recent
from trainer.errors import InputError
from trainer.evaluation.recency.stored import open_recency_term
from trainer.evaluation.recency.term import TERM_HALF_LIVES
from trainer.evaluation.sampled import build_history_query
from trainer.files.lock import lock_folder
from trainer.retraining.registry import check_version
from trainer.run_files import RECENCY_TERM
from trainer.serving.export import export_run
from trainer.serving.item_offsets import CountMoment, OffsetFormula
from trainer.serving.refresh_counts import refresh_counts

ITEMS = (5, 4)
STARTS = (0, ITEMS[0] + ROOM)
DAY = 86_400
BEGIN = 17_000 * DAY
ROOT = trainer.serving.refresh_counts.__file__.split("/trainer/")[0]


def draw_log(users=20, days=40, seed=0):
    """user, domain, item, time of each event; times are within the day, away from midnight."""
    random = np.random.default_rng(seed)
    events = []
    for user in range(users):
        length = int(random.integers(4, 9))
        for day in np.sort(random.integers(0, days, length)):
            domain = int(random.integers(0, 2))
            item = int(random.integers(0, ITEMS[domain]))
            second = int(random.integers(6 * 3600, 18 * 3600))
            events.append((user, domain, item, BEGIN + int(day) * DAY + second))
    return sorted(events, key=lambda event: (event[0], event[3]))


def write_timed(folder, events, unit="s"):
    """A dataset of these events, with their times in seconds."""
    times = np.array([event[3] for event in events], np.float64)
    first, last = times.min(), times.max()
    histories, ticks = [], []
    for _, own in itertools.groupby(events, key=lambda event: event[0]):
        own = list(own)
        histories.append(
            np.array([STARTS[domain] + item for _, domain, item, _ in own])
        )
        own_times = np.array([event[3] for event in own])
        ticks.append(quantize_times(own_times, first, last))
    made = write_dataset(folder, histories, ITEMS, ticks=ticks)
    timed = dataclasses.replace(
        made,
        first_time=float(first),
        last_time=float(last),
        tie_order="hash",
        tied_users=0,
        time_kind="numbers",
        time_unit=unit,
    )
    timed.save()
    return Dataset.load(folder)


def write_log(file, events, more=()):
    """The same events as a log."""
    rows = [
        (f"u{user}", f"d{domain}-{item}", f"domain {domain}", time)
        for user, domain, item, time in events
    ]
    rows += more
    columns = zip(*rows, strict=True)
    names = ("user_id", "item_id", "domain", "timestamp")
    pq.write_table(
        pa.table(dict(zip(names, map(list, columns), strict=True))), file
    )
    return str(file)


LOG = draw_log()
CUT = BEGIN + 30 * DAY
OLD = [event for event in LOG if event[3] < CUT]
NEW = [event for event in LOG if event[3] >= CUT]


def drawn_weights(run):
    """Weights that say something, as if they had been fitted."""
    file = run.folder / RECENCY_TERM
    record = json.loads(file.read_text())
    random = np.random.default_rng(1)
    for entry in record["domains"].values():
        entry["score"] = 1.7
        weights = random.normal(size=len(TERM_HALF_LIVES))
        entry["weights"] = weights.round(3).tolist()
    file.write_text(json.dumps(record))


def dated_run(folder, ranks, unit="s"):
    """A run on the older events, with a term."""
    folder.mkdir(exist_ok=True)
    # A clock would go by the ticks of the longer log in a fresh export.
    run = finished_run(
        folder,
        ranks,
        "evaluation.min_users=1",
        "model.time_knots=0",
        data=OLD_DATA[unit](folder),
    )
    term_of(run)
    drawn_weights(run)
    return run


OLD_DATA = {
    "s": lambda folder: write_timed(folder / "data", OLD),
    "unknown": lambda folder: write_timed(folder / "data", OLD, "unknown"),
}


def trained_of(run, data=None):
    config, dataset = open_run(run.folder, data)
    return load_trained_model(run.folder, config, dataset, run.ranks)


def term_of(run, data=None):
    trained = trained_of(run, data)
    counts = count_recent(trained.dataset, run.ranks, trained.config.stream)
    return open_recency_term(trained, counts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks:
        yield dated_run(tmp_path_factory.mktemp("run"), ranks)


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """The dataset extended by the newer events."""
    return write_timed(tmp_path_factory.mktemp("later") / "data", LOG)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    export_run(run.folder, output, run.ranks, ExportConfig(recency_term=True))
    return output


@pytest.fixture(scope="module")
def fresh(run, later, tmp_path_factory):
    """An export made over the extended dataset."""
    output = tmp_path_factory.mktemp("fresh") / "model"
    config = ExportConfig(recency_term=True)
    export_run(run.folder, output, run.ranks, config, later.folder)
    return output


@pytest.fixture(scope="module")
def before(folder, later):
    """The older counts' scores at the newer log's end."""
    return scores_of(folder, later.last_time)


@pytest.fixture(scope="module")
def wanted(fresh, later):
    return scores_of(fresh, later.last_time)


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "new.parquet", NEW)


@pytest.fixture
def no_encoders(monkeypatch):
    """Exports have none: they take seconds each, and say nothing of the rest."""
    monkeypatch.setattr(
        trainer.serving.export, "_write_encoder", lambda *_: None
    )


def example_of(folder):
    spec = importlib.util.spec_from_file_location(
        "an_example", folder / "example.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Recommender(folder)


def scores_of(folder, now):
    """The example's scores of all items for a few histories: {(history, domain, item): score}."""
    recommender = example_of(folder)
    scores = {}
    for number, history in enumerate(HISTORIES):
        for domain in recommender.domains:
            for item, score in recommender(history, domain, 99, now):
                scores[number, domain, item] = score
    return scores


HISTORIES = [
    [],
    [(BEGIN + 5 * DAY, "domain 0", "d0-2")],
    [
        (BEGIN + 5 * DAY, "domain 1", "d1-3"),
        (BEGIN + 7 * DAY, "domain 0", "d0-0"),
    ],
]


def test_scores_are_the_trainers_with_its_term(run, folder):
    """The model's by itself, on the sharded table, with weights and counts of its own term."""
    trained = trained_of(run)
    dataset = trained.dataset
    term = term_of(run)
    assert (term.weight_DK[:, 0] == 1.7).all()
    table = trained.table(torch.arange(dataset.num_embeddings)).detach()
    found = scores_of(folder, dataset.last_time)
    checked = 0
    for number, history in enumerate(HISTORIES):
        events = [
            (STARTS[int(name[-1])] + int(item[-1]), time)
            for time, name, item in history
        ]
        rows = np.array([row for row, _ in events], np.int64)
        times = np.array([time for _, time in events])
        query = build_history_query(
            dataset,
            rows,
            dataset.ticks(times),
            np.array([len(rows)]),
            np.array([65535]),
            trained.config.model.max_length,
            np.zeros(0, np.int64),
            trained.model.config.predicts_by_both,
        )
        with torch.no_grad():
            y_DR = trained.model(query, table[query.ids])[0]
        for domain, described in enumerate(dataset.domains):
            own = np.arange(described.start, described.start + described.items)
            day = term.features.counts.days.count
            expected = 1.7 * (table[own] @ y_DR[domain]).numpy()
            expected = expected + term.biases(domain, own, day)
            for place, row in enumerate(own):
                if row in rows:
                    continue
                key = (number, described.name, f"d{domain}-{place}")
                assert found.pop(key) == pytest.approx(
                    expected[place], abs=1e-5
                )
                checked += 1
    assert not found and checked > 20


def test_a_users_vector_has_a_one_behind_it_for_an_index(folder):
    """What FAISS would compute: one inner product of width + 1."""
    recommender = example_of(folder)
    user = recommender.encode_user([], "domain 0", BEGIN + 29 * DAY)
    domain = recommender.domains["domain 0"]
    assert user.shape == (domain.items.shape[1] + 1,) and user[-1] == 1
    vectors = np.column_stack([domain.items, domain.offsets])
    scores = dict(recommender([], "domain 0", 99, BEGIN + 29 * DAY))
    for item, score in zip(domain.ids, vectors @ user.numpy(), strict=True):
        assert scores[item] == pytest.approx(score, abs=1e-5)


def same_offsets(one, other):
    for domain in ("domain-0", "domain-1"):
        for name in ("offsets.npy", "counts.npy"):
            np.testing.assert_allclose(
                np.load(one / domain / name),
                np.load(other / domain / name),
                atol=1e-5,
            )


@pytest.mark.parametrize("source", ["logs", "dataset", "days"])
def test_refreshed_scores_are_those_of_a_fresh_export(
    folder, fresh, later, before, wanted, log, tmp_path, source
):
    """By logs at once, day after day, and by the extended dataset."""
    output = tmp_path / "out"
    if source == "days":
        current = folder
        for number in range(30, 40):
            own = [
                event
                for event in NEW
                if event[3] // DAY == BEGIN // DAY + number
            ]
            if not own:
                continue
            output = tmp_path / f"day-{number}"
            config = RefreshConfig(
                inputs=(write_log(tmp_path / f"{number}.parquet", own),)
            )
            refresh_counts(current, config, output)
            current = output
    else:
        given = log if source == "logs" else str(later.folder)
        record = refresh_counts(folder, RefreshConfig(inputs=(given,)), output)
        assert record["events"] == len(NEW if source == "logs" else LOG)
        assert record["until"] == later.last_time
    same_offsets(output, fresh)
    found = scores_of(output, later.last_time)
    assert found == pytest.approx(wanted, abs=1e-5)
    largest = max(abs(found[key] - before[key]) for key in found)
    assert largest > 0.05


def test_a_refreshed_folder_is_whole_and_shares_what_stays(
    folder, log, tmp_path
):
    refresh_counts(folder, RefreshConfig(inputs=(log,)), tmp_path / "model")
    check_version(tmp_path)
    schema = json.loads((tmp_path / "model" / "schema.json").read_text())
    for name, entry in schema["files"].items():
        assert File(name, **entry) == File.of(tmp_path / "model", name)
    items = tmp_path / "model" / "domain-0" / "items.npy"
    assert items.samefile(folder / "domain-0" / "items.npy")
    for name in ("counts.npy", "offsets.npy"):
        written = tmp_path / "model" / "domain-0" / name
        assert not written.samefile(folder / "domain-0" / name)


def copied(folder, target, log):
    """A copy of the export; by a refresh of nothing it would be refused."""
    import shutil

    shutil.copytree(folder, target)
    return target


def test_a_folder_is_replaced_in_one_move(folder, fresh, log, tmp_path):
    own = copied(folder, tmp_path / "model", log)
    (own / "notes.txt").write_text("mine")
    refresh_counts(own, RefreshConfig(inputs=(log,)))
    same_offsets(own, fresh)
    assert (own / "notes.txt").read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", "new.parquet"}
    with pytest.raises(InputError, match="nothing is newer than what"):
        refresh_counts(own, RefreshConfig(inputs=(log,)))
    same_offsets(own, fresh)


def test_two_refreshes_of_one_folder_are_one_after_the_other(
    folder, log, tmp_path
):
    """The second would go on from counts without the first one's events."""
    model = copied(folder, tmp_path / "model", log)
    config = RefreshConfig(inputs=(log,))
    with lock_folder(model):
        with pytest.raises(InputError, match="another refresh replaces it"):
            refresh_counts(model, config)
        refresh_counts(model, config, tmp_path / "beside")
    refresh_counts(model, config)


@pytest.mark.parametrize("output", [None, "out"])
def test_what_fails_halfway_leaves_everything_as_it_was(
    folder, log, tmp_path, monkeypatch, output
):
    own = copied(folder, tmp_path / "model", log)
    before = {file: file.read_bytes() for file in own.rglob("*.np*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.serving.refresh_counts, "write_schema", full)
    given = None if output is None else tmp_path / output
    with pytest.raises(InputError, match="No space left on device"):
        refresh_counts(own, RefreshConfig(inputs=(log,)), given)
    assert {file: file.read_bytes() for file in own.rglob("*.np*")} == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", "new.parquet"}


def test_what_cannot_be_counted_is_counted_apart(folder, tmp_path):
    newest = max(event[3] for event in OLD)
    more = [
        ("u1", "no such item", "domain 0", newest + DAY),
        ("u1", "d0-1", "no such domain", newest + DAY),
        ("u1", "d0-1", "domain 0", newest),
        ("u1", "d0-1", "domain 0", newest + 1),
    ]
    log = write_log(tmp_path / "log.parquet", [], more)
    record = refresh_counts(
        folder, RefreshConfig(inputs=(log,)), tmp_path / "out"
    )
    assert record == {
        "events": 1,
        "older": 1,
        "unknown_items": 1,
        "unknown_domains": 1,
        "until": newest + DAY,
        "as_of": newest // DAY + 2,
    }
    before = np.load(folder / "domain-0" / "counts.npy")
    after = np.load(tmp_path / "out" / "domain-0" / "counts.npy")
    assert after[1, -1] == before[1, -1] + 1
    expected = before[1, 0] * 2 ** (-1 / 7) + 2 ** (-2 / 7)
    assert after[1, 0] == pytest.approx(expected)


def edited(folder, target, log, change):
    own = copied(folder, target, log)
    schema = json.loads((own / "schema.json").read_text())
    change(schema)
    (own / "schema.json").write_text(json.dumps(schema))
    return own


BAD = {
    "no term": (lambda s: s.pop("recency"), "was exported without the recency"),
    "no moment": (
        lambda s: s["recency"].pop("until"),
        "cannot be used .it has no 'until'",
    ),
    "another unit": (
        lambda s: s["recency"].update(unit="weeks"),
        "'weeks'",
    ),
    "no weights": (
        lambda s: s["domains"][0]["recency"].update(weights=[1]),
        "it has 1 weights",
    ),
    "a folder elsewhere": (
        lambda s: s["domains"][0].update(folder="../domain-0"),
        "is no folder",
    ),
    "other counts": (
        lambda s: s["files"]["domain-0/counts.npy"].update(bytes=3),
        "domain-0/counts.npy is not as it was exported",
    ),
    "other times": (
        lambda s: s.update(time_kind="dates", time_unit="us"),
        "its times are dates, those of .* are numbers",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_one_line(
    folder, log, tmp_path, change, message
):
    own = edited(folder, tmp_path / "model", log, change)
    with pytest.raises(InputError, match=message) as error:
        refresh_counts(own, RefreshConfig(inputs=(log,)), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_the_term_an_export_is_what_it_was(
    run, tmp_path, log, no_encoders
):
    schema = export_run(
        run.folder, tmp_path / "model", run.ranks, ExportConfig()
    )
    assert schema["format_version"] == 2
    assert "recency" not in schema and "faiss" not in schema
    assert not list(tmp_path.glob("model/*/offsets.npy"))
    keys = {"name", "folder", "items", "id_type", "own_weight"}
    assert schema["domains"][0].keys() == keys
    with pytest.raises(InputError, match="was exported without"):
        refresh_counts(tmp_path / "model", RefreshConfig(inputs=(log,)))


def test_a_run_that_has_the_term_on_is_exported_with_it(
    run, tmp_path, no_encoders
):
    own = run.copied(tmp_path / "run")
    file = own.folder / "config.yaml"
    text = file.read_text()
    assert "recency_term: false" in text
    file.write_text(text.replace("recency_term: false", "recency_term: true"))
    first = export_run(own.folder, tmp_path / "1", run.ranks, ExportConfig())
    assert first["format_version"] == 3
    plain = ExportConfig(recency_term=False)
    second = export_run(own.folder, tmp_path / "2", run.ranks, plain)
    assert second["format_version"] == 2


def test_an_index_has_the_offsets_and_is_made_anew(run, log, tmp_path):
    faiss = pytest.importorskip("faiss", reason="FAISS is an extra")
    config = ExportConfig(faiss="Flat", recency_term=True)
    export_run(run.folder, tmp_path / "old", run.ranks, config)
    refresh_counts(
        tmp_path / "old", RefreshConfig(inputs=(log,)), tmp_path / "new"
    )
    for folder in ("old", "new"):
        recommender = example_of(tmp_path / folder)
        file = tmp_path / folder / "domain-0" / "index.faiss"
        index = faiss.read_index(str(file))
        user = recommender.encode_user([], "domain 0", BEGIN)[None].numpy()
        found, places = index.search(user, 3)
        wanted = recommender([], "domain 0", 3, BEGIN)
        ids = recommender.domains["domain 0"].ids
        assert [ids[place] for place in places[0]] == [i for i, _ in wanted]
        assert found[0] == pytest.approx([s for _, s in wanted], abs=1e-5)


def test_times_of_no_known_unit_go_on_in_the_exports_measure(
    run, tmp_path, no_encoders
):
    run = dated_run(tmp_path / "run", run.ranks, "unknown")
    config = ExportConfig(recency_term=True)
    schema = export_run(run.folder, tmp_path / "model", run.ranks, config)
    assert schema["recency"]["unit"] == "hundredths of the log's time"
    assert schema["recency"]["as_of"] == 100
    log = write_log(tmp_path / "new.parquet", NEW)
    record = refresh_counts(
        tmp_path / "model", RefreshConfig(inputs=(log,)), tmp_path / "out"
    )
    span = run.dataset.last_time - run.dataset.first_time
    parts = 100 * (record["until"] - run.dataset.first_time) / span
    assert record["as_of"] == int(parts) + 1
    check_version_of(tmp_path / "out")


def check_version_of(model):
    schema = json.loads((model / "schema.json").read_text())
    for name, entry in schema["files"].items():
        assert File(name, **entry) == File.of(model, name)


days = st.integers(0, 60)


@given(
    events=st.lists(st.tuples(days, st.integers(0, 3)), min_size=1),
    cut=days,
    half_life=st.sampled_from([1.0, 7.0, 365.0, float("inf")]),
)
def test_counts_carried_on_are_those_of_all_events(events, cut, half_life):
    """At any cut: what was counted before fades, and the rest is added."""
    formula = OffsetFormula((half_life,), 0.05)

    def counted(own, as_of):
        counts = np.zeros((4, 1))
        for day, item in own:
            counts[item] += formula.fade(np.array([as_of - day]))[0]
        return counts

    end = max(day for day, _ in events) + 1
    cut = min(cut, end)
    before = counted([event for event in events if event[0] < cut], cut)
    carried = before * formula.fade(np.array([end - cut]))
    newer = counted([event for event in events if event[0] >= cut], end)
    np.testing.assert_allclose(carried + newer, counted(events, end))


def test_a_moment_is_read_back():
    moment = CountMoment("days", 0.0, 86400.0, 17_001, BEGIN + 5.0)
    assert CountMoment.from_record(moment.to_record()) == moment
    assert moment.day_of(BEGIN) == 17_000 and moment.day_of(BEGIN - 1) == 16_999


def test_the_command_counts_and_says_what_it_left_out(
    folder, tmp_path, capsys, monkeypatch
):
    newest = max(event[3] for event in OLD)
    more = [("u1", "new", "domain 0", newest + DAY)]
    log = write_log(tmp_path / "log.parquet", NEW, more)
    words = ["--model", str(folder), "--refresh-counts", log]
    words += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["export", *words])
    export_script.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{tmp_path / 'out'}: {len(NEW)} events of its items counted",
        "  1 events are of items that the model does not know: left out",
    ]


@pytest.mark.ranks
def test_a_refresh_loads_no_pytorch(folder, log, tmp_path):
    program = (
        "import sys; sys.argv = ['export', '--model', sys.argv[1], '--refresh-counts',"
        " sys.argv[2], '--output', sys.argv[3]]\n"
        "from launch.export import main\nmain()\n"
        "print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, log, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
