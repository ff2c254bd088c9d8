"""Recommendations of a small run against what its model and table say, item by item."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import trainer.serving.recommend
import trainer.serving.recommendation_files
from tests.helpers.made import draw_histories, draw_ticks
from tests.helpers.runs import finished_run, rank_of_one, records_read_once
from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.config.serving import HistoriesConfig, RecommendConfig
from trainer.data.format.dataset import TICKS
from trainer.data.loading.day_counts import count_recent
from trainer.errors import InputError
from trainer.evaluation.recency.term import (
    OFFSET,
    TERM_HALF_LIVES,
    RecencyFeatures,
    RecencyTerm,
)
from trainer.evaluation.sampled import build_history_query
from trainer.files.staged import StagedOutput
from trainer.serving.recommend import recommend
from trainer.serving.recommendation_files import (
    RecommendationFiles,
    hive_folder,
)
from trainer.serving.top_items import Scorer

pytestmark = pytest.mark.ranks  # they start processes

DOMAINS = {"domain 0": range(0, 5), "domain 1": range(8, 12)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps that is the only rank's; its `known` is {raw user id: history}."""
    with rank_of_one() as ranks, records_read_once():
        yield finished_run(tmp_path_factory.mktemp("run"), ranks)


@pytest.fixture(scope="module")
def score(run):
    """score(history, ticks): the exact score of each row of M at the end of the dataset's time, float64."""
    config, dataset = open_run(run.folder)
    trained = load_trained_model(run.folder, config, dataset, run.ranks)
    model = trained.model
    table = trained.table
    with torch.no_grad():
        vectors = table(torch.arange(dataset.num_embeddings)).double().numpy()

    @torch.no_grad()
    def of(history, ticks):
        items, lengths, now = (
            np.array(history, np.int64),
            np.array([len(history)]),
            np.array([TICKS]),
        )
        query = build_history_query(
            dataset,
            items,
            np.array(ticks, np.int64),
            lengths,
            now,
            8,
            np.zeros(0, np.int64),
            True,
        )
        y_DR = model(query, table(query.ids))[0].double().numpy()
        return (vectors * y_DR[dataset.domain_of(np.arange(len(vectors)))]).sum(
            1
        )

    return of


def made(run, output, asked=None, fresh=False, **options):
    return recommend(
        run.folder,
        output,
        run.ranks,
        RecommendConfig(**options),
        asked or HistoriesConfig(),
        fresh=fresh,
    )


def found(output, part_users):
    """{(user, domain): [(rank, item, score)]}, and {user: history's length}; a user's rows are together, in one part."""
    recommended, lengths = {}, {}
    for file in sorted(output.glob("domain=*/part-*.parquet")):
        table = pq.ParquetFile(file).read()
        assert table.schema.names == [
            "user_id",
            "history",
            "rank",
            "item_id",
            "score",
        ]
        assert table.schema.types[1:] == [
            pa.int32(),
            pa.int32(),
            pa.string(),
            pa.float32(),
        ]
        own = {}
        for row in table.to_pylist():
            key = row["user_id"], file.parent.name.removeprefix("domain=")
            assert key not in recommended and (
                row["rank"] == 1 or key == list(own)[-1]
            )
            own.setdefault(key, []).append(
                (row["rank"], row["item_id"], row["score"])
            )
            lengths[row["user_id"]] = row["history"]
        assert len(own) <= part_users
        recommended |= own
    return recommended, lengths


def history_of(run, user):
    return draw_histories(20)[user].tolist()


def expected(score, history, ticks, domain, k, keep_seen):
    rows = [row for row in DOMAINS[domain] if keep_seen or row not in history]
    scores = score(history, ticks)
    best = sorted(rows, key=lambda row: (-np.float32(scores[row]), row))[:k]
    first = DOMAINS[domain][0]
    return [
        (
            rank,
            f"d{domain[-1]}-{row - first}",
            pytest.approx(scores[row], abs=1e-6),
        )
        for rank, row in enumerate(best, 1)
    ]


SOME = [
    {"k": 2},
    {"k": 50},
    {"k": 50, "keep_seen": True, "batch_size": 3},
    {"k": 1, "domains": ("domain 1",)},
]


@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("part_users", [7, 100])
def test_every_user_gets_the_best_items_that_are_left(
    run, score, tmp_path, options, part_users
):
    record = made(
        run, tmp_path / "out", HistoriesConfig(part_users=part_users), **options
    )
    recommended, lengths = found(tmp_path / "out", part_users)
    names = options.get("domains", tuple(DOMAINS))
    histories = {f"u{user}": history_of(run, user) for user in range(20)}
    assert lengths.keys() == histories.keys()
    for (user, history), ticks in zip(
        histories.items(), draw_ticks(histories.values()), strict=True
    ):
        assert lengths[user] == len(history)
        for domain in names:
            wanted = expected(
                score,
                history,
                ticks,
                domain,
                options["k"],
                options.get("keep_seen", False),
            )
            assert recommended.pop((user, domain), []) == wanted
    assert not recommended
    assert record == json.loads(
        (tmp_path / "out" / "_recommend.json").read_text()
    )
    assert record["users"] == 20 and record["rows"].keys() == set(names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "_recommend.json",
        *(f"domain={name}" for name in names),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_users_that_training_never_saw_and_those_without_history(
    run, score, tmp_path
):
    rows = [
        ("new", "d0-1", "domain 0", 1),
        ("new", "d1-3", "domain 1", 2),
        ("new", "?", "domain 1", 3),
    ]
    rows.append(("odd", "d0-1", "?", 1))
    columns = dict(
        zip(
            ("user_id", "item_id", "domain", "timestamp"),
            zip(*rows, strict=True),
            strict=True,
        )
    )
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    pq.write_table(
        pa.table({"user_id": ["new", "odd", "given"]}),
        tmp_path / "users.parquet",
    )
    asked = HistoriesConfig(
        inputs=(str(tmp_path / "log.parquet"),),
        users=str(tmp_path / "users.parquet"),
    )
    record = made(run, tmp_path / "out", asked, k=3)
    recommended, lengths = found(tmp_path / "out", 100)
    assert lengths == {"given": 0, "new": 2, "odd": 0}
    for domain in DOMAINS:
        assert recommended["new", domain] == expected(
            score, [1, 11], [1, 2], domain, 3, False
        )
        assert recommended["odd", domain] == expected(
            score, [], [], domain, 3, False
        )
        assert recommended["given", domain] == expected(
            score, [], [], domain, 3, False
        )
    counts = {
        "users": 3,
        "without_history": 2,
        "unknown_domain": 1,
        "unknown_item": 1,
        "unread": 0,
    }
    assert record.items() >= counts.items()


def test_numbers_stay_numbers(run, tmp_path):
    pq.write_table(
        pa.table({"user_id": pa.array([5, 70], pa.int16())}),
        tmp_path / "users.parquet",
    )
    made(
        run,
        tmp_path / "out",
        HistoriesConfig(users=str(tmp_path / "users.parquet")),
        k=1,
    )
    (file,) = (tmp_path / "out" / "domain=domain 1").iterdir()
    assert pq.read_schema(file).field("user_id").type == pa.int64()


@pytest.mark.parametrize(
    ("ranks", "batch_size", "part_users", "together"),
    [
        (1, 512, 7, 1),
        (64, 512, 65536, 1),
        (128, 512, 65536, 1),
        (129, 512, 65536, 2),
        (512, 512, 65536, 4),
        (3, 512, 90, 3),
    ],
)
def test_no_rank_is_without_users(ranks, batch_size, part_users, together):
    """As many parts are scored at once as give each rank a step of them."""
    scorer = SimpleNamespace(
        config=RecommendConfig(batch_size=batch_size),
        served=SimpleNamespace(ranks=SimpleNamespace(world_size=ranks)),
    )
    groups = Scorer.group_parts(scorer, list(range(9)), part_users)
    assert [part for group in groups for part in group] == list(range(9))
    assert (
        len(groups[0]) == together
        and together * -(-part_users // batch_size) >= ranks
    )


class Killed(BaseException):
    pass


def killed_after(monkeypatch, parts):
    """The next call ends when it has written so many parts, as a kill would end it."""
    write, written = RecommendationFiles._write_part, []

    def counted(self, part, *others):
        if len(written) == parts:
            raise Killed
        written.append(part)
        write(self, part, *others)

    monkeypatch.setattr(RecommendationFiles, "_write_part", counted)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_call_that_was_killed_goes_on_with_the_parts_that_are_missing(
    run, tmp_path, monkeypatch
):
    asked = HistoriesConfig(part_users=6)
    made(run, tmp_path / "whole", asked, k=3)
    for parts in range(4):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, parts)
            made(run, tmp_path / f"killed {parts}", asked, k=3)
        assert not (tmp_path / f"killed {parts}").exists()
        scored = []
        with monkeypatch.context() as patch:
            call = Scorer.score_parts
            patch.setattr(
                Scorer,
                "score_parts",
                lambda *given: scored.append(1) or call(*given),  # noqa: B023
            )
            made(run, tmp_path / f"killed {parts}", asked, k=3)
        assert len(scored) == 4 - parts
        assert contents(tmp_path / f"killed {parts}") == contents(
            tmp_path / "whole"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["whole", *(f"killed {parts}" for parts in range(4))]
    )


def test_putting_the_parts_in_place_may_be_interrupted_too(
    run, tmp_path, monkeypatch
):
    asked = HistoriesConfig(part_users=6)
    made(run, tmp_path / "whole", asked)

    def failing(*_):
        raise Killed

    for place, name in (
        (trainer.serving.recommendation_files, "write_json"),
        (StagedOutput, "deliver"),
        (StagedOutput, "discard"),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, failing)
            made(run, tmp_path / name, asked)
        made(run, tmp_path / name, asked)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "deliver",
        "discard",
        "whole",
        "write_json",
    ]


OTHERWISE = {
    "k": ({"k": 4}, {}, "k was 3, is 4"),
    "domains": (
        {"k": 3, "domains": ("domain 1",)},
        {},
        "domains was ['domain 0', 'domain 1'], is ['domain 1']",
    ),
    "keep_seen": (
        {"k": 3, "keep_seen": True},
        {},
        "keep_seen was False, is True",
    ),
    "part_users": ({"k": 3}, {"part_users": 5}, "part_users was 6, is 5"),
    "users": ({"k": 3}, {"users": "users.parquet"}, "users was []"),
}


@pytest.mark.parametrize(
    ("options", "asked", "message"), OTHERWISE.values(), ids=OTHERWISE
)
def test_what_differs_from_the_call_that_was_killed_is_named(
    run, tmp_path, monkeypatch, options, asked, message
):
    pq.write_table(pa.table({"user_id": ["u1"]}), tmp_path / "users.parquet")
    asked = {
        name: str(tmp_path / value) if name == "users" else value
        for name, value in asked.items()
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        made(run, tmp_path / "out", HistoriesConfig(part_users=6), k=3)
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        made(
            run,
            tmp_path / "out",
            HistoriesConfig(**{"part_users": 6} | asked),
            **options,
        )
    assert message in str(error.value) and "--fresh" in str(error.value)
    assert contents(tmp_path) == before
    made(
        run,
        tmp_path / "out",
        HistoriesConfig(**{"part_users": 6} | asked),
        fresh=True,
        **options,
    )
    assert (tmp_path / "out" / "_recommend.json").exists()


def test_another_model_is_another_output(run, tmp_path, monkeypatch):
    own = run.copied(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        made(own, tmp_path / "out", HistoriesConfig(part_users=6))
    manifest = next(own.folder.glob("checkpoints/*/manifest.json"))
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="model was"):
        made(own, tmp_path / "out", HistoriesConfig(part_users=6))


def test_a_finished_output_is_left_as_it_is(run, tmp_path):
    record = made(run, tmp_path / "out", k=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert made(run, tmp_path / "out", k=3) == record
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
    } == before
    with pytest.raises(InputError, match="already holds something"):
        made(run, tmp_path / "out", k=4)


BAD = {
    "an unknown domain": (
        {"domains": ("moon",)},
        {},
        "; it has domain 0, domain 1",
    ),
    "no such log": (
        {},
        {"inputs": ("nowhere.parquet",)},
        "nowhere.parquet does not exist",
    ),
    "no such users": ({}, {"users": "nobody.csv"}, "nobody.csv does not exist"),
}


@pytest.mark.parametrize(("options", "asked", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named_and_leaves_nothing(
    run, tmp_path, options, asked, message
):
    with pytest.raises(InputError) as error:
        made(run, tmp_path / "out", HistoriesConfig(**asked), **options)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["k", "batch_size"])
def test_bad_options_are_named(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        RecommendConfig(**{name: 0})


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("shop", "domain=shop"),
        ("Amazon Fashion", "domain=Amazon Fashion"),
        ("a/b", "domain=a%2Fb"),
        ("50%=half", "domain=50%25%3Dhalf"),
        ("Küche", "domain=Küche"),
        ("a:b?\n", "domain=a%3Ab%3F%0A"),
    ],
)
def test_a_folder_is_quoted_as_hive_does(name, folder):
    assert hive_folder(name) == folder


def test_with_the_recency_term_scores_are_those_of_the_day_after_the_last(
    run, score, tmp_path, monkeypatch
):
    """Its weights are drawn here, so that they say something; everything in the dataset counts."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(2, 1 + len(TERM_HALF_LIVES)))
    config, dataset = open_run(run.folder)
    counts = count_recent(dataset, run.ranks, config.stream)
    term = RecencyTerm(RecencyFeatures(counts), weights, np.full(2, 9))
    monkeypatch.setattr(
        trainer.serving.recommend, "open_recency_term", lambda *_: term
    )
    made(run, tmp_path / "plain", k=50)
    record = made(run, tmp_path / "out", k=50, recency_term=True)
    assert record["made_from"]["recency_term"] is True
    recommended, _ = found(tmp_path / "out", 100)
    histories = [history_of(run, user) for user in range(20)]
    ticks = draw_ticks(histories)
    number_T = counts.days.number_T
    after = int(number_T[-1]) + 1

    def count(row, half_life):
        total = 0.0
        for items, times in zip(histories, ticks, strict=True):
            for item, time in zip(items, times, strict=True):
                if item == row:
                    total += 0.5 ** ((after - int(number_T[time])) / half_life)
        return total

    checked = 0
    for (user, name), own in recommended.items():
        number = int(name[-1])
        history = histories[int(user[1:])]
        plain = score(history, ticks[int(user[1:])])
        values = {}
        for row in DOMAINS[name]:
            if row not in history:
                values[row] = weights[number, 0] * plain[row] + sum(
                    weight * np.log(count(row, half_life) + OFFSET)
                    for weight, half_life in zip(
                        weights[number, 1:], TERM_HALF_LIVES, strict=True
                    )
                )
        best = sorted(values.values(), reverse=True)
        assert [row[2] for row in own] == pytest.approx(best, abs=1e-4)
        checked += len(own)
    assert checked > 20
    assert found(tmp_path / "plain", 100)[0] != recommended


def test_an_output_without_the_term_is_not_one_with_it(run, tmp_path):
    """Nor are outputs of before, which do not say, made anew."""
    output = tmp_path / "out"
    first = made(run, output, k=1)
    file = output / "_recommend.json"
    before = json.loads(file.read_text())
    assert before["made_from"].pop("recency_term") is False
    file.write_text(json.dumps(before))
    assert made(run, output, k=1) == before != first
    with pytest.raises(InputError, match="already"):
        made(run, output, k=1, recency_term=True)


def test_the_term_is_not_for_logs_that_the_dataset_does_not_have(run, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,domain,timestamp\n")
    asked = HistoriesConfig(inputs=(str(tmp_path / "log.csv"),))
    with pytest.raises(InputError, match=r"--extend.*--skip-recency-term"):
        made(run, tmp_path / "out", asked, recency_term=True)


def test_scores_have_the_term_where_the_run_says_so(run, tmp_path, monkeypatch):
    config = open_run(run.folder)[0]
    evaluation = replace(config.evaluation, recency_term=True)
    timed = replace(config, evaluation=evaluation)

    def open_timed(*arguments, **options):
        return timed, open_run(*arguments, **options)[1]

    opened = []
    monkeypatch.setattr(trainer.serving.recommend, "open_run", open_timed)
    monkeypatch.setattr(
        trainer.serving.recommend,
        "open_recency_term",
        lambda *_: opened.append(1),
    )
    for asked, with_term in ((None, True), (False, False)):
        output = tmp_path / str(asked)
        record = made(run, output, k=1, recency_term=asked)
        assert record["made_from"]["recency_term"] is with_term
    assert opened == [1]
