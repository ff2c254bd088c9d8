"""Yesterday's model on today's events: against a slow plain computation, and that nothing looks ahead."""

import json
import math
import shutil
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.made import ROOM, draw_histories, draw_ticks, write_dataset
from tests.helpers.runs import finished_run, rank_of_one
from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.data.format.dataset import TICKS
from trainer.data.recent_counts import Days
from trainer.data.split import LEAVE_ONE_OUT
from trainer.errors import InputError
from trainer.evaluation import sampled
from trainer.evaluation.metrics import candidate_positions, metric_values
from trainer.evaluation.popularity import break_ties, candidate_scores
from trainer.evaluation.sampled import RankingBatches, build_history_query
from trainer.retraining import prequential
from trainer.retraining.prequential import (
    ArrivalSplit,
    clustered_error,
    score_arrivals,
)

OLD_ITEMS, ITEMS = (5, 4), (9, 6)
OLD_STARTS, STARTS = (0, 5 + ROOM), (0, 9 + ROOM)
CUT = 40_000  # the tick of yesterday's last event
SETTINGS = (
    "evaluation.negatives=3",
    "evaluation.min_users=4",
    "evaluation.batch_size=5",
    "optimizer.learning_rate=0.2",
)


@pytest.fixture(scope="module")
def ranks():
    with rank_of_one() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), ranks, *SETTINGS)


def draw_days():
    """Histories and ticks of 30 users, of whom the last six come today; old rows alone until CUT."""
    random = np.random.default_rng(7)
    histories = draw_histories(30, ITEMS, longest=14, seed=1)
    ticks = draw_ticks(histories, seed=1)
    known = []
    for start, items in zip(STARTS, OLD_ITEMS, strict=True):
        known.append(start + np.arange(items))
    known = np.concatenate(known)
    for user, (history, when) in enumerate(zip(histories, ticks, strict=True)):
        if user >= 24:
            when[:] = np.sort(random.integers(CUT + 1, TICKS, len(when)))
        old = when <= CUT
        history[old] = random.choice(known, size=int(old.sum()))
    ticks[0][0] = min(ticks[0][0], CUT)
    return histories, ticks


def write_day(folder, run, histories, ticks):
    """A dataset that says that it extends the run's own."""
    dataset = write_dataset(
        folder,
        histories,
        ITEMS,
        cuts=(7, 18),
        streams=3,
        ticks=ticks,
    )
    extension = folder / "extension"
    extension.mkdir()
    old_rows, new_rows = [], []
    for domain, items in enumerate(ITEMS):
        for item in range(items):
            is_old = item < OLD_ITEMS[domain]
            old_rows.append(OLD_STARTS[domain] + item if is_old else None)
            new_rows.append(STARTS[domain] + item)
    rows = {
        "old_row": pa.array(old_rows, pa.int64()),
        "new_row": pa.array(new_rows, pa.int64()),
    }
    pq.write_table(pa.table(rows), extension / "rows.parquet")
    record = {
        "of": run.dataset.fingerprint,
        "span_before": [0.0, float(CUT)],
        "domains_before": ["domain 0", "domain 1"],
    }
    (extension / "extension.json").write_text(json.dumps(record))
    return dataset


@pytest.fixture(scope="module")
def day(run, tmp_path_factory):
    return write_day(tmp_path_factory.mktemp("day") / "data", run, *draw_days())


@pytest.fixture(scope="module")
def record(run, day, ranks):
    return score_arrivals(run.folder, ranks, day.folder)


class PlainDay:
    """Every event of today, one by one."""

    def __init__(self, run, day, ranks):
        self.histories, self.ticks = draw_days()
        config, _ = open_run(run.folder, day.folder, ranks=ranks)
        self.config = config
        # Shown to the old model: what it learnt from.
        self.learnt = np.zeros(day.num_embeddings, np.int64)
        for history, when in zip(self.histories, self.ticks, strict=True):
            old = history[when <= CUT]
            if len(old) >= 3:
                old = old[:-2]
            np.add.at(self.learnt, old, 1)
        known = prequential.match_model(
            run.folder,
            run.folder / "checkpoints/step-00000003",
            run.dataset.fingerprint,
            day,
            ranks,
        )
        split = ArrivalSplit(CUT + 1, CUT + 1)
        self.dataset = prequential._hold_out_arrivals(
            day, split, known, config, ranks
        )
        self.trained = load_trained_model(
            run.folder, config, self.dataset, ranks
        )

    def targets(self):
        """(user, place) of every event after CUT with something before it."""
        for user, when in enumerate(self.ticks):
            for place in range(1, len(when)):
                if when[place] > CUT:
                    yield user, place

    def saw(self, user, place):
        """Whether the model has learnt from the event's item."""
        return self.learnt[self.histories[user][place]] > 0

    def candidates(self):
        """{(user, place): rows}, the event's item first, as sampled evaluation draws them."""
        batches = RankingBatches(
            self.dataset,
            0,
            1,
            self.config.evaluation,
            self.config.model.max_length,
            "test",
            self.config.seed,
            stream=self.config.stream,
            both_views=self.config.model.predicts_by_both,
        )
        found = defaultdict(list)
        for batch in batches:
            ends = np.cumsum(batch.counts_B)
            for place, user in enumerate(batch.user_B):
                if user >= 0:
                    begin = ends[place] - batch.counts_B[place]
                    rows = batch.rows_C[begin : ends[place]]
                    found[int(user)].append(rows)
        by_target = {}
        places = defaultdict(list)
        for user, place in self.targets():
            places[user].append(place)
        assert places.keys() == found.keys()
        for user, own in places.items():
            for place, rows in zip(own, found[user], strict=True):
                assert rows[0] == self.histories[user][place]
                assert self.learnt[rows[1:]].all()
                by_target[user, place] = rows
        return by_target

    def model_scores(self, user, place, rows):
        history = self.histories[user][:place]
        query = build_history_query(
            self.dataset,
            np.asarray(history, np.int64),
            self.ticks[user][:place],
            np.array([place]),
            np.array([int(self.ticks[user][place])]),
            self.config.model.max_length,
            rows,
            self.config.model.predicts_by_both,
        )
        with torch.no_grad():
            vectors = self.trained.table(query.ids)
            (y_DR,) = self.trained.model(query, vectors)
        domain = int(self.dataset.domain_of(rows[:1])[0])
        return (vectors[query.interactions :] @ y_DR[domain]).numpy()

    def recent_counts(self, user, place, rows, half_life):
        """Every event of every user on an earlier day."""
        day_N = Days.of(self.dataset).of_ticks(np.concatenate(self.ticks))
        row_N = np.concatenate(self.histories)
        when = self.ticks[user][place : place + 1]
        (today,) = Days.of(self.dataset).of_ticks(when)
        counts = []
        for row in rows:
            ages = today - day_N[row_N == row]
            faded = 0.5 ** (ages[ages > 0] / half_life)
            counts.append(faded.sum())
        return np.round(counts, 6)

    def positions(self, half_life):
        """{system: {(user, place): position}}."""
        found = defaultdict(dict)
        for (user, place), rows in self.candidates().items():
            users, counts = np.array([user]), np.array([len(rows)])
            seed = self.config.seed
            recent = self.recent_counts(user, place, rows, half_life)
            scores = {
                "domains": self.model_scores(user, place, rows),
                "recency": break_ties(recent, seed, users, counts, rows),
                "popularity": candidate_scores(
                    self.learnt, seed, users, counts, rows
                ),
            }
            for system, score in scores.items():
                (position,) = candidate_positions(score, counts)
                found[system][user, place] = position
        return found


@pytest.fixture(scope="module")
def plain(run, day, ranks):
    return PlainDay(run, day, ranks)


@pytest.fixture(scope="module")
def positions(plain, record):
    return plain.positions(record["recency_choice"]["half_life"])


def test_figures_are_those_of_a_slow_plain_computation(
    plain, record, positions
):
    targets = list(plain.targets())
    assert len({user for user, _ in targets}) < len(targets) > 60
    domain_of = {}
    for user, place in targets:
        row = plain.histories[user][place]
        domain_of[user, place] = int(row >= STARTS[1])
    unseen = record["unseen"] | {"domains": record["unseen"]["model"]}
    for number, name in enumerate(("domain 0", "domain 1")):
        for group, is_seen in ((record, True), (unseen, False)):
            own = []
            for target in targets:
                seen = plain.saw(*target) == is_seen
                if domain_of[target] == number and seen:
                    own.append(target)
            assert own
            for system in ("domains", "recency", "popularity"):
                figures = group[system][name]
                assert figures["users"] == len(own)
                places = [positions[system][target] for target in own]
                for metric in ("NDCG@10", "HR@5", "MRR"):
                    expected = metric_values(metric, np.array(places)).mean()
                    assert figures[metric] == pytest.approx(expected), system
    without = 0
    for when in plain.ticks:
        without += int(when[0] > CUT)
    assert record["split"]["without_history"] == without > 0


def test_the_comparison_with_recency_knows_that_a_users_events_are_alike(
    plain, record, positions
):
    for number, name in enumerate(("domain 0", "domain 1")):
        by_user = defaultdict(list)
        for user, place in plain.targets():
            domain = int(plain.histories[user][place] >= STARTS[1])
            if domain == number and plain.saw(user, place):
                gains = []
                for system in ("domains", "recency"):
                    position = np.array([positions[system][user, place]])
                    gains.append(metric_values("NDCG@10", position)[0])
                by_user[user].append(gains)
        events = sum(map(len, by_user.values()))
        now, before = np.concatenate(list(by_user.values())).mean(0)
        square = 0.0
        for pairs in by_user.values():
            rest = 0.0
            for one, other in pairs:
                rest += one - other - (now - before)
            square += rest**2
        users = len(by_user)
        error = math.sqrt(square * users / (users - 1)) / events
        expected = {"now": now, "before": before, "error": error}
        figures = dict(record["against_recency"][name])
        assert figures.pop("system") == "model"
        assert figures.pop("users") == users < events
        assert figures == pytest.approx(expected)


@pytest.fixture
def scores(monkeypatch):
    """What each target's candidates score, and where each system ranks it: {number: (…)}."""
    found = {}
    newest = []
    visit = prequential._ArrivalPositions.visit
    scores_of_others = sampled._OtherSystems.scores

    def scores(self, candidates, scores_C):
        newest[:] = scores_of_others(self, candidates, scores_C)
        return list(newest)

    def watched(self, candidates, positions, scores_C):
        visit(self, candidates, positions, scores_C)
        ends = np.cumsum(candidates.counts_B)
        others = list(newest)
        for place, number in enumerate(candidates.number_B.tolist()):
            if number < 0:
                continue
            begin = ends[place] - candidates.counts_B[place]
            own = slice(begin, ends[place])
            found[number] = [score_C[own].tolist() for score_C in others]
            found[number].append(scores_C[own].tolist())
            found[number].append(
                [int(position_B[place]) for position_B in positions.values()]
            )

    monkeypatch.setattr(sampled._OtherSystems, "scores", scores)
    monkeypatch.setattr(prequential._ArrivalPositions, "visit", watched)
    return found


def test_an_event_that_is_moved_changes_nothing_before_it(
    run, ranks, tmp_path, scores
):
    """Each event's scores by the model, with its term, by recency: what comes later is not used."""
    histories, ticks = draw_days()
    write_day(tmp_path / "day", run, histories, ticks)
    score_arrivals(run.folder, ranks, tmp_path / "day", recency_term=True)
    before = dict(scores)
    user = max(range(24), key=lambda user: int(ticks[user][-1]))
    was = int(ticks[user][-2]) + 1  # of its last event, which moves here
    assert was > CUT and int(ticks[user][-1]) - was > 3 * TICKS // 100
    ticks[user][-1] = was
    shutil.rmtree(tmp_path / "day")
    scores.clear()
    write_day(tmp_path / "day", run, histories, ticks)
    score_arrivals(run.folder, ranks, tmp_path / "day", recency_term=True)
    number, earlier, changed = 0, 0, 0
    for other, when in enumerate(ticks):
        for place in range(1, len(when)):
            if when[place] <= CUT:
                continue
            if (other, place) != (user, len(when) - 1):
                if when[place] <= was:
                    assert scores[number] == before[number]
                    earlier += 1
                changed += scores[number] != before[number]
            number += 1
    assert number == len(before) == len(scores)
    assert earlier > 10 and changed > 0


def test_the_recency_term_is_fitted_on_yesterdays_validation(
    run, day, ranks, record
):
    with_term = score_arrivals(run.folder, ranks, day.folder, recency_term=True)
    assert with_term["domains"] == record["domains"]
    assert "with_recency" not in record and "with_recency" in with_term
    for figures in with_term["against_recency"].values():
        assert figures["system"] == "with_recency"
    fitted = 0
    _, ticks = draw_days()
    for when in ticks:
        fitted += int(np.count_nonzero(when <= CUT) >= 3)
    domains = with_term["recency_term"]["domains"].values()
    assert sum(own["users"] for own in domains) == fitted


def test_what_lies_between_the_models_logs_and_todays_is_history_alone():
    """The logs of a refused day: the model has not learnt from them, and they are not ranked again."""
    lengths_B = np.array([6, 2])
    ticks_N = np.array([1, 2, 3, 10, 20, 30, 12, 25], np.uint16)
    split = ArrivalSplit(5, 18)
    assert split.training_lengths(lengths_B, ticks_N).tolist() == [1, 0]
    user_T, place_T = split.targets("validation", lengths_B, ticks_N)
    assert (user_T.tolist(), place_T.tolist()) == ([0], [1])
    user_T, place_T = split.targets("test", lengths_B, ticks_N)
    assert (user_T.tolist(), place_T.tolist()) == ([0, 0, 1], [4, 5, 1])
    until = np.minimum(lengths_B, [3, 0])
    expected = LEAVE_ONE_OUT.training_lengths(until, ticks_N)
    assert split.training_lengths(lengths_B, ticks_N).tolist() == (
        expected.tolist()
    )


def test_a_day_without_news_and_logs_without_times_say_so(run, ranks, tmp_path):
    histories, ticks = draw_days()
    assert score_arrivals(run.folder, ranks)["skipped"].startswith(
        "no event is later than "
    )
    folder = tmp_path / "day"
    write_day(folder, run, histories, ticks)
    file = folder / "extension/extension.json"
    extension = json.loads(file.read_text())
    file.write_text(json.dumps(extension | {"span_before": [0, TICKS]}))
    record = score_arrivals(run.folder, ranks, folder)
    assert record == {
        "kind": "arrivals",
        "skipped": f"no event is later than {TICKS}, where the logs before end",
    }
    file.write_text(json.dumps(extension | {"span_before": 3}))
    with pytest.raises(InputError, match="/extension: cannot be used"):
        score_arrivals(run.folder, ranks, folder)
    file.write_text(json.dumps(extension))
    dataset = folder / "dataset.json"
    content = json.loads(dataset.read_text()) | {"last_time": 0.0}
    dataset.write_text(json.dumps(content))
    record = score_arrivals(run.folder, ranks, folder)
    assert record["skipped"] == (
        "all events have one time: which of them came later is not known"
    )


def test_errors_are_over_users():
    users, error = clustered_error(
        np.array([0.3, 0.1, -0.1]), np.array([7, 7, 9])
    )
    assert users == 2 and error == pytest.approx(math.sqrt(2 * 0.08) / 3)
    assert clustered_error(np.array([0.3, 0.1]), np.array([7, 7])) == (1, None)
    assert clustered_error(np.zeros(0), np.zeros(0)) == (0, None)
