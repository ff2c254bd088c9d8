"""A study's tables and first sentences: colours by evidence, users, p, which domains count."""

from types import SimpleNamespace

import numpy as np
import pytest

from trainer.config.study import StudyConfig
from trainer.evaluation.metrics import metric_values
from trainer.study.report import _lead
from trainer.study.results import SystemResults
from trainer.study.runner import Study
from trainer.study.tables import make_tables

USERS = {"large": 2000, "medium": 300, "small": 19, "none": 0}


def results(name, rank_U, domain_U):
    rank_SU = np.atleast_2d(rank_U)
    one = [1.0] * len(rank_SU)
    return SystemResults(
        name,
        np.arange(len(domain_U)),
        domain_U,
        {"sampled": rank_SU, "full": rank_SU},
        one,
        one,
        one,
        one,
    )


@pytest.fixture
def study():
    """SyNCRec is a place better than SDSR in the large domain, and no better in the medium one."""
    rng = np.random.default_rng(0)
    domain_U = np.repeat(np.arange(4), list(USERS.values()))
    alone_U = rng.integers(1, 30, len(domain_U))
    small_U = domain_U == 2
    alone_U[small_U] = 3
    ours_U = alone_U.copy()
    ours_U[domain_U == 0] = np.maximum(1, alone_U[domain_U == 0] - 1)
    # A loss by its sign, and no evidence.
    ours_U[small_U] = [5] * 10 + [2] * 8 + [3]
    domains = [SimpleNamespace(name=name, items=9) for name in USERS]
    dataset = SimpleNamespace(domains=domains, users=2319, interactions=9999)
    return Study(
        dataset=dataset,
        config=StudyConfig(systems=["SyNCRec", "SDSR"]),
        results={
            "SyNCRec": results("SyNCRec", ours_U, domain_U),
            "SDSR": results("SDSR", alone_U, domain_U),
        },
        baselines={},
        best_settings={},
        trials={},
        sweeps={},
        example=None,
        failed={},
        unconverged={"SyNCRec": ["SyNCRec-seed=0"]},
        min_users=50,
    )


def table(study, title):
    (found,) = [
        table for table in make_tables(study) if table.title.startswith(title)
    ][:1]
    rows = {row[0].text: row[1:] for row in found.rows}
    return found, rows


def test_users_stand_above_every_column(study):
    for title in ("NDCG@10 by", "Against SDSR", "SyNCRec against each"):
        found, rows = table(study, title)
        assert found.columns[:7] == ["system", *USERS, "mean", "over users"]
        counts = [cell.text for cell in rows["test users"]][:6]
        assert counts == ["2,000", "300", "19", "0", "2,300", "2,319"]


def test_small_domains_are_shown_and_not_in_the_mean(study):
    found, rows = table(study, "NDCG@10 by")
    gain_U = metric_values("NDCG@10", study.results["SDSR"].position["full"][0])
    large, medium, small = (
        gain_U[study.results["SDSR"].domain_U == number].mean()
        for number in range(3)
    )
    assert [cell.text for cell in rows["SDSR"]] == [
        f"{large:.4f}",
        f"{medium:.4f}",
        f"{small:.4f}",
        "–",
        f"{(large + medium) / 2:.4f}",
        f"{gain_U.mean():.4f}",
    ]
    assert (
        "The mean is of 2 domains; left out, with fewer than 50 users: small (19)."
        in found.text
    )


@pytest.mark.parametrize(
    ("title", "row"),
    [("Against SDSR", "SyNCRec"), ("SyNCRec against each", "SDSR")],
)
def test_colours_are_by_evidence_and_signs_are_alike(study, title, row):
    """In both tables SyNCRec is better where the figure is above 0."""
    _, rows = table(study, title)
    large, medium, small, none, mean, _ = rows[row][:6]
    assert (large.sense, medium.sense, small.sense) == ("better", "", "")
    assert large.text.startswith("+") and "(p ≤ 0.002)" in large.text
    assert small.text.startswith("\N{MINUS SIGN}") and "(p 0." in small.text
    assert none.text == "–" and "(p " in mean.text


def test_too_few_users_have_no_p(study):
    domain_U = study.results["SDSR"].domain_U.copy()
    domain_U[(domain_U == 2).cumsum() > 5] = 1
    domain_U.sort()
    for system in study.results.values():
        system.domain_U[:] = domain_U
    _, rows = table(study, "Against SDSR")
    assert rows["SyNCRec"][2].text.endswith("(few users)")
    assert rows["SyNCRec"][2].sense == ""


def test_the_first_sentences_say_p_small_domains_and_what_had_not_converged(
    study,
):
    said = " ".join(_lead(study))
    assert "the best of the others is SDSR with" in said
    assert "(SyNCRec: +" in said and "p ≤ 0.002)" in said
    assert "Over users: " in said and "left out" in said
    assert (
        "Warning: not converged. The best epoch was the last one of SyNCRec-seed=0"
        in said
    )
    _, rows = table(study, "What it cost")
    assert rows["SyNCRec"][2].text == "1" and rows["SDSR"][2].text == "0"


def test_a_lead_that_may_be_chance_says_so(study):
    ours = study.results["SyNCRec"]
    alone = study.results["SDSR"]
    for ranking in ("sampled", "full"):
        ours.position[ranking][:] = alone.position[ranking]
    said = " ".join(_lead(study))
    assert "p 1.000, which may be chance)" in said


def test_with_the_recency_term_systems_are_compared_among_themselves(study):
    """SyNCRec with the term is what others stand beside; SDSR with it is what domains stand alone by."""
    domain_U = study.results["SDSR"].domain_U
    for name in list(study.results):
        rank_U = np.maximum(1, study.results[name].position["full"][0] - 2)
        with_term = f"{name} + recency"
        study.results[with_term] = results(with_term, rank_U, domain_U)
    assert study.ours == "SyNCRec + recency"
    _, against = table(study, "SyNCRec + recency against each")
    assert list(against) == ["test users", "SyNCRec", "SDSR", "SDSR + recency"]
    _, alone = table(study, "Against SDSR")
    assert list(alone) == ["test users", "SyNCRec", "SyNCRec + recency"]
    assert alone["SyNCRec + recency"][1].sense == ""  # the medium domain
    for title in ("What it cost", "What the systems are"):
        found, rows = table(study, title)
        assert set(rows) == {"SyNCRec", "SDSR"}
    assert "A name with + recency is the same trained model" in found.text
    assert "SyNCRec + recency has a mean NDCG@10 of" in " ".join(_lead(study))
