"""Which falls speak against a candidate: rules, evidence, and how often either errs."""

import math
import re

import numpy as np
import pytest

from trainer.config.retraining import PublishConfig
from trainer.evaluation.metrics import metric_values
from trainer.retraining.guards import (
    compare_positions,
    find_significant,
    judge,
    one_sided_p,
    standard_error,
)


def figures(candidate, current, then):
    return {
        "a": {
            "users": 1000,
            "candidate": candidate,
            "candidate_error": 0.0,
            "current": current,
            "difference": {"error": 0.0},
            "when_published": then,
            "when_published_error": 0.0,
        }
    }


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        (figures(0.30, None, None), []),
        (figures(None, None, None), []),
        (figures(0.30, 0.30, 0.30), []),
        (figures(0.295, 0.30, 0.30), []),
        (figures(0.293, 0.30, 0.30), ["the current model has 0.3000"]),
        (figures(0.25, 0.20, 0.30), []),
        (
            figures(0.23, 0.20, 0.30),
            [
                "mean NDCG@10 0.2300, 0.3000 when .* unlike those before .a -23 %."
            ],
        ),
        (
            figures(0.17, 0.17, 0.30),
            [
                "a: NDCG@10 0.1700, 0.3000 when .* unlike those before",
                "mean NDCG@10 0.1700",
            ],
        ),
        (
            figures(0.23, 0.25, 0.30),
            ["the current model has 0.2500", "mean NDCG@10 0.2300"],
        ),
        (figures(0.19, 0.10, 0.30) | {"b": figures(0.30, 0.30, 0.30)["a"]}, []),
        (
            figures(0.17, 0.10, 0.30) | {"b": figures(0.40, 0.30, 0.30)["a"]},
            ["a: NDCG@10 0.1700"],
        ),
        (
            figures(0.20, 0.10, 0.30) | {"b": figures(0.25, 0.20, 0.30)["a"]},
            ["mean NDCG@10 0.2250, .* .a -33 %, b -17 %."],
        ),
    ],
)
def test_what_speaks_against_it(domains, words):
    reasons = judge(domains, PublishConfig()).reasons
    assert len(reasons) == len(words) and all(
        re.search(word, reason)
        for word, reason in zip(words, reasons, strict=True)
    )


def test_items_that_are_nobodys_speak_against_it():
    def of(gain, then):
        return figures(0.3, 0.3, 0.3)["a"] | {
            "own_item": gain,
            "own_item_error": 0.0,
            "own_item_then": then,
            "own_item_then_error": 0.0,
        }

    for domains, words in (
        ({"a": of(0.06, 0.1), "b": of(0.05, 0.1)}, None),
        (
            {"a": of(0.06, 0.1), "b": of(0.03, 0.1)},
            "0.0450 higher .*, it was 0.1000 higher .*a 0.0600 after 0.1000, b 0.0300",
        ),
        ({"a": of(None, 0.1), "b": of(0.03, None)}, None),
        ({"a": of(-0.01, 0.0)}, None),
    ):
        reasons = judge(domains, PublishConfig()).reasons
        assert bool(reasons) == bool(words)
        if words:
            assert any(re.search(words, reason) for reason in reasons)
            assert reasons[0].startswith(
                "b: a held-out item's NDCG@10 is 0.0300"
            )


def test_holm_compares_the_least_p_with_the_strictest_level():
    assert find_significant([0.30, 0.001, 0.016, 0.04], 0.05) == [
        False,
        True,
        True,
        False,
    ]
    assert find_significant([0.04], 0.05) == [True]
    assert find_significant([0.04, 0.04], 0.05) == [False, False]
    assert find_significant([], 0.05) == []


@pytest.mark.parametrize(
    ("t", "users", "p"),
    [
        (-2.262, 10, 0.025),
        (-2.821, 10, 0.010),
        (-2.010, 50, 0.025),
        (-3.265, 50, 0.001),
        (-1.96, 100_000, 0.025),
        (0, 50, 0.5),
        (2.010, 50, 0.975),
    ],
)
def test_p_is_that_of_students_t(t, users, p):
    """Against printed tables of the t-distribution."""
    assert one_sided_p(t * 0.1, 0.1, users) == pytest.approx(p, rel=0.03)


def test_without_an_error_nothing_is_known():
    assert one_sided_p(-0.5, None, 1) == one_sided_p(-0.5, 0.1, 1) == 1
    assert one_sided_p(-0.5, 0.0, 9) == 0 and one_sided_p(0.0, 0.0, 9) == 1
    assert standard_error(np.array([1.0])) is None
    assert standard_error(np.array([0.0, 1.0])) == pytest.approx(0.5)


def test_figures_are_of_the_same_users():
    found = compare_positions(np.array([1, 2, 3]), np.array([1, 4, 3]))
    gains = [1, 1 / math.log2(3), 0.5]
    lost = 1 / math.log2(3) - 1 / math.log2(5)
    assert found["users"] == 3
    assert found["candidate"] == pytest.approx(np.mean(gains))
    assert found["difference"]["value"] == pytest.approx(lost / 3)
    assert found["difference"]["error"] == pytest.approx(
        np.std([0, lost, 0], ddof=1) / math.sqrt(3)
    )
    assert compare_positions(np.array([], int), None)["candidate"] is None


NIGHTS = 200
USERS = {"tiny": 18, "a": 60, "b": 150, "c": 400, "d": 1000, "e": 1500}


def draw_positions(rng, users, exponent):
    """Positions among 100; the greater the exponent, the better: 3 has a mean NDCG@10 of 0.38."""
    return np.ceil(100 * rng.random(users) ** exponent)


def seen_by_a_model(rng, position_B):
    """The positions by one model: others of the same users differ by a standard deviation of 0.2."""
    noise_B = np.exp(0.35 * rng.normal(size=len(position_B)))
    return np.clip(np.rint(position_B * noise_B), 1, 100)


def own_gain(rng, own_B):
    """How much higher items rank for their own users, and its standard error."""
    others_B = draw_positions(rng, len(own_B), 1.6)
    gain_B = metric_values("NDCG@10", own_B)
    gain_B = gain_B - metric_values("NDCG@10", others_B)
    return float(gain_B.mean()), standard_error(gain_B)


def night(rng, users, lost=0.0, worse="", spoiled=""):
    """Figures by domain. lost: the share of its NDCG@10 that the domain `worse` really loses.

    spoiled: the domain whose items are shuffled: they rank as for any user, by both models.
    """
    domains = {}
    for name, count in users.items():
        then_B = draw_positions(rng, count, 3)
        exponent = 1.8 if name == spoiled else 3
        today_B = draw_positions(rng, count, exponent)
        candidate_B = seen_by_a_model(rng, today_B)
        current_B = seen_by_a_model(rng, today_B)
        if name == worse:
            candidate_B[rng.random(count) < lost] = 100
        published = compare_positions(then_B, None)
        record = compare_positions(candidate_B, current_B)
        record["when_published"] = published["candidate"]
        record["when_published_error"] = published["candidate_error"]
        for suffix, own_B in (("", candidate_B), ("_then", then_B)):
            gain, error = own_gain(rng, own_B)
            record[f"own_item{suffix}"] = gain
            record[f"own_item{suffix}_error"] = error
        domains[name] = record
    return domains


def reasons_of_nights(rules, nights, **facts):
    """The reasons against the candidate of each night."""
    found = []
    for seed in range(nights):
        rng = np.random.default_rng(seed)
        found.append(judge(night(rng, **facts), rules, 50).reasons)
    return found


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_a_night_on_which_nothing_is_worse_is_refused_at_the_level_at_most(
    level,
):
    """Even where no fall at all is allowed, so that the evidence alone decides."""
    strict = PublishConfig(
        level=level, tolerance=0, fall=0, domain_fall=0, own_fall=0
    )
    for rules in (strict, PublishConfig(level=level)):
        nights = reasons_of_nights(rules, NIGHTS, users=USERS)
        refused = sum(map(bool, nights)) / NIGHTS
        noise = math.sqrt(level * (1 - level) / NIGHTS)
        assert refused <= level + 2 * noise
        if rules is strict:
            assert refused >= 0.3 * level  # the tests are no formality


def share_that_begins(nights, words):
    """The share of nights that have a reason that begins so."""
    found = 0
    for reasons in nights:
        found += any(reason.startswith(words) for reason in reasons)
    return found / len(nights)


@pytest.mark.parametrize(("users", "lost"), [(2000, 0.1), (20_000, 0.04)])
def test_a_real_fall_of_a_large_domain_is_refused(users, lost):
    nights = reasons_of_nights(
        PublishConfig(), 50, users=USERS | {"d": users}, worse="d", lost=lost
    )
    assert share_that_begins(nights, "d: NDCG@10 ") >= 0.98


@pytest.mark.parametrize(("users", "least"), [(400, 0.9), (1000, 1.0)])
def test_items_shuffled_in_one_domain_are_refused(users, least):
    """By what is unlike the days before: the current model is as bad, so a comparison says nothing."""
    nights = reasons_of_nights(
        PublishConfig(), 50, users=USERS | {"d": users}, spoiled="d"
    )
    assert share_that_begins(nights, "d: a held-out item") >= least


def test_a_small_domain_that_falls_by_chance_does_not_refuse():
    """The night of a real report: five of six domains better, 18 users of the sixth 6 % worse."""
    domains = figures(0.46, 0.44, 0.45) | {
        "docu": figures(0.2801, 0.2991, 0.3)["a"]
    }
    domains["docu"] |= {"users": 18, "difference": {"error": 0.04}}
    found = judge(domains, PublishConfig(), 50)
    assert found.reasons == []
    assert found.notes == ["docu: 18 users, fewer than 50: it does not judge"]
    domains["docu"]["users"] = 60
    found = judge(domains, PublishConfig(), 50)
    assert found.reasons == []
    (note,) = found.notes
    assert re.fullmatch(
        r"docu: NDCG@10 0\.2801, the current model has 0\.2991 \(60 users\): "
        r"this may be chance \(p 0\.3\d\)",
        note,
    )
    found = judge(domains, PublishConfig(), 2000)
    assert found.notes[-1] == "no domain has 2,000 users: all judge"


def arrivals(now, before, error=0.01, users=400):
    return {"now": now, "before": before, "error": error, "users": users}


def test_below_recency_popularity_warns_and_does_not_refuse():
    """In a family of its own: the others' evidence does not suffer from it."""
    domains = {
        "below": arrivals(0.20, 0.25),
        "<chance>": arrivals(0.20, 0.21),
        "above": arrivals(0.30, 0.25),
        "small": arrivals(0.00, 0.25, users=9),
    }
    judgement = judge(
        figures(0.30, 0.30, None), PublishConfig(), 50, arrivals=domains
    )
    assert judgement.reasons == [] and judgement.notes == []
    assert judgement.below_recency == ["below"]
    (warning,) = judgement.warnings
    assert warning == (
        "below: the model that served ranked the day's events with NDCG@10 0.2000, "
        "recency popularity with 0.2500 (400 users)"
    )
    rules = [(test["rule"], test["domain"]) for test in judgement.tests]
    assert rules == [
        ("tolerance", "a"),
        ("below_recency", "below"),
        ("below_recency", "<chance>"),
        ("below_recency", "above"),
    ]


def test_below_recency_popularity_refuses_where_that_is_set():
    domains = {
        "below": arrivals(0.20, 0.25),
        "chance": arrivals(0.20, 0.21),
    }
    rules = PublishConfig(below_recency="refuse")
    judgement = judge(figures(0.30, 0.30, None), rules, 50, arrivals=domains)
    (reason,) = judgement.reasons
    assert reason.startswith("below: the model that served")
    (note,) = judgement.notes
    assert note.startswith("chance: ") and "this may be chance" in note
    assert judgement.warnings == []
    assert judgement.below_recency == ["below"]


def test_a_warning_does_not_weaken_the_other_rules():
    """p is .0228 of both: one test alone is significant at .05 by Holm's method, two are too; three are not."""
    fallen = figures(0.28, 0.30, None)
    fallen["a"]["difference"] = {"error": 0.01}
    equal = {str(number): arrivals(0.2, 0.2) for number in range(9)}
    assert judge(fallen, PublishConfig(), 1, arrivals=equal).reasons
    rules = PublishConfig(below_recency="refuse")
    assert not judge(fallen, rules, 1, arrivals=equal).reasons
