"""RecBole is handed our split and our candidates, and its scores are ranked as ours. RecBole itself is not installed here."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import recbole_peer, suite
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.evaluation import EvaluationConfig
from trainer.data.split import SPLIT_LENGTH
from trainer.errors import InputError
from trainer.evaluation.candidate_files import read_candidates
from trainer.evaluation.sampled import RankingBatches

HISTORIES = draw_histories(30, items=(140, 125), longest=12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("peer") / "data",
        HISTORIES,
        (140, 125),
        cuts=(7, 20),
        streams=3,
    )


@pytest.fixture(scope="module")
def given(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    recbole_peer.hand_over(dataset, folder)
    return folder


def test_histories_are_handed_over_by_user_number_without_those_too_short_to_split(
    given,
):
    long = [history for history in HISTORIES if len(history) >= SPLIT_LENGTH]
    assert 0 < len(long) < len(HISTORIES)
    assert np.load(given / "lengths.npy").tolist() == [
        len(history) for history in long
    ]
    assert np.load(given / "items.npy").tolist() == [
        int(item) for history in long for item in history
    ]


@pytest.mark.parametrize(("split", "back"), [("validation", 2), ("test", 1)])
def test_candidates_are_those_that_our_evaluation_ranks(
    dataset, given, split, back
):
    handed_UC = np.load(given / f"candidates-{split}.npy")
    own = {}
    for built in RankingBatches(
        dataset, 0, 1, EvaluationConfig(), 64, split, seed=0
    ):
        rows = np.split(built.rows_C, np.cumsum(built.counts_B)[:-1])
        own |= {
            int(user): row.tolist()
            for user, row in zip(built.user_B, rows, strict=True)
            if user >= 0
        }
    users = [
        user
        for user, history in enumerate(HISTORIES)
        if len(history) >= SPLIT_LENGTH
    ]
    assert handed_UC.tolist() == [own[user] for user in users]
    assert handed_UC[:, 0].tolist() == [
        HISTORIES[user][-back] for user in users
    ]
    if split == "test":  # and so does `launch/evaluate.py --candidates`
        read = read_candidates(dataset, given / "candidates-test.parquet")
        assert {user: rows.tolist() for user, (_, rows) in read.items()} == own


def test_too_small_a_domain_is_refused(tmp_path):
    small = write_dataset(
        tmp_path / "data",
        draw_histories(30, items=(140, 90), longest=12),
        (140, 90),
    )
    with pytest.raises(InputError, match=r"^a domain has too few items"):
        recbole_peer.hand_over(small, tmp_path)


def test_scores_are_ranked_by_domain_and_a_tie_or_no_number_counts_against_the_item(
    dataset, given
):
    candidates_UC = np.load(given / "candidates-test.npy")
    scores_UC = np.tile(
        -np.arange(100.0, dtype=np.float32), (len(candidates_UC), 1)
    )  # the held-out item first
    domain_U = dataset.domain_of(candidates_UC[:, 0])
    scores_UC[domain_U == 1, 1] = 0  # a tie
    worst = np.flatnonzero(domain_U == 0)[0]
    scores_UC[worst] = np.nan
    record = recbole_peer.ranked(
        SimpleNamespace(given=given, dataset=dataset), "test", scores_UC
    )
    first, second = record["domains"].values()
    assert (
        first["users"] == (domain_U == 0).sum()
        and second["users"] == (domain_U == 1).sum()
    )
    assert (
        first["HR@10"] == pytest.approx(1 - 1 / first["users"])
        and first["NDCG@10"] == first["HR@10"]
    )
    assert second["NDCG@10"] == pytest.approx(1 / np.log2(3))
    assert record["mean"]["NDCG@10"] == pytest.approx(
        (first["NDCG@10"] + second["NDCG@10"]) / 2
    )


def speed(system, loss, predicted, *rates):
    rates = suite.spread(rates)
    return {
        "system": system,
        "loss": loss,
        "predicted_per_step": predicted,
        "interactions_per_second": rates,
    }


def quality(system, training, loss, value, best, epochs, **more):
    mean = {"NDCG@10": value, "HR@10": 2 * value, "MRR": value / 2}
    found = {
        "system": system,
        "training": training,
        "loss": loss,
        "mean": mean,
        "best_epoch": best,
    }
    return (
        found | {"epochs": [{"epoch": epoch} for epoch in range(epochs)]} | more
    )


def test_tables_divide_by_the_fastest_and_by_the_default_and_join_seeds():
    rates = [
        speed("SASRec", "sampled softmax", 2047.6, 9_000, 10_000, 12_000),
        speed("RecBole SASRec", "CE", 2048, 200, 250, 260),
        speed("RecBole SASRec", "BPR", 512, 500),
    ]
    ours, default, _ = recbole_peer.speed_table(rates).splitlines()[2:]
    cells = [
        "SASRec",
        "sampled softmax",
        "2,048",
        "10,000 (9,000 – 12,000)",
        "20.0",
        "40.0",
    ]
    assert [cell.strip() for cell in ours.strip("|").split("|")] == cells
    assert [cell.strip() for cell in default.strip("|").split("|")][-2:] == [
        "0.5",
        "1.0",
    ]
    found = [
        quality("SASRec", "its own", "sampled softmax", 0.3, 3, 6, seed=0),
        quality("SASRec", "its own", "sampled softmax", 0.32, 4, 6, seed=1),
        quality(
            "RecBole SASRec",
            "by users",
            "CE",
            0.31,
            1,
            2,
            stopped="limit of minutes",
        ),
    ]
    ours, peer = recbole_peer.quality_table(found).splitlines()[2:]
    assert (
        "0.3100 (0.3000 – 0.3200)" in ours
        and "| 4, 5 |" in " ".join(ours.split())
        and "limit" not in ours
    )
    assert "0.3100" in peer and "2 (limit of minutes)" in peer


def test_without_recboles_environment_one_line_says_how_to_make_it(capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings(
            "recbole_peer", recbole_peer.Settings, ["python=nowhere/python"]
        )
    assert (
        left.value.code == 2
        and "python is nowhere/python, which is not there: make peers"
        in capsys.readouterr().err
    )
