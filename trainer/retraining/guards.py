"""What speaks against publishing a candidate: falls that are too large, and no chance.

Rules hold a figure against one of before. A fall counts against a candidate where both hold:

- it is larger than the rule allows (a share of the figure of before);
- it is significant: a one-sided t-test over users, all tests of a night together at the family-wise
  level `level`, by Holm's method. So a night on which nothing has become worse is refused with a
  chance of `level` at most, however many domains there are.

    rule           now                                before                                  test
    tolerance      the candidate's NDCG@10            the current model's, of the same users  paired
    domain_fall    the candidate's NDCG@10            the current one's when published        unpaired
    fall           the same, mean over domains                                                unpaired
    own_fall       an item's NDCG@10 for its own      the same when the current version was   unpaired
                   user less another's                published; by domain, and their mean

    below_recency  NDCG@10 on the day's arrivals by   recency popularity's, of the same       clustered
                   the model that served until then   events                                  by user

The last one only warns, in a family of tests of its own, unless `below_recency` says that it refuses.
It allows no fall, and is skipped where nothing was ranked (trainer/retraining/prequential.py).

Domains with fewer than `min_users` users are not tested and in no mean. They are named.

S. Holm, "A simple sequentially rejective multiple test procedure", 1979. This module needs NumPy
alone. Legend of shapes: B users of a domain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.config.retraining import REFUSE, PublicationRules
from trainer.evaluation.metrics import domains_of_mean, metric_values
from trainer.run_files import HEADLINE

_UNLIKE = "the logs are unlike those before"
_WHEN = "when the current model was published"
_BELOW_RECENCY = "below_recency"

DomainRecord = dict[str, Any]  # a domain's figures, as `publish` records them


@dataclass(frozen=True)
class Judgement:
    """What was found. reasons: against publishing; notes: falls that do not count, and why not.

    tests: of each test its rule, domain (None: of the mean), now, before, error, users and p.
    warnings: of domains whose model is below recency popularity; their names are `below_recency`.
    """

    reasons: list[str]
    notes: list[str]
    tests: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    below_recency: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fall:
    """A figure beside the one that it is held against.

    domain: None of a mean over domains. error: the standard error of `now` less `before`; None
    where it is not known. users: of the domain, or the fewest of a mean's. allowed: the share of
    `before` that `now` may lack. words: says so.
    """

    rule: str
    domain: str | None
    now: float
    before: float
    error: float | None
    users: int
    allowed: float
    words: str

    @property
    def is_too_large(self) -> bool:
        """Whether it is larger than allowed."""
        return self.now < (1 - self.allowed) * self.before

    @property
    def p(self) -> float:
        """The chance of a difference so low where nothing has fallen."""
        return one_sided_p(self.now - self.before, self.error, self.users)

    def describe(self) -> dict[str, Any]:
        """For a record."""
        return {
            "rule": self.rule,
            "domain": self.domain,
            "now": self.now,
            "before": self.before,
            "error": self.error,
            "users": self.users,
            "p": self.p,
        }


def compare_positions(
    position_B: np.ndarray, current_B: np.ndarray | None
) -> DomainRecord:
    """A domain's figures by the candidate, and by the current model where there is one.

    position_B, current_B: where each ranks the held-out items of the same users, from 1:

        position_B    1    2    3
        current_B     1    4    3
        candidate 0.71, current 0.64, difference 0.07 with the error 0.07
    """
    gain_B = metric_values(HEADLINE, position_B)
    figures: DomainRecord = {
        "users": len(gain_B),
        "candidate": float(gain_B.mean()) if len(gain_B) else None,
        "candidate_error": standard_error(gain_B),
        "current": None,
        "difference": None,
    }
    if current_B is not None:
        current_gain_B = metric_values(HEADLINE, current_B)
        difference_B = gain_B - current_gain_B
        value = None
        if len(gain_B):
            figures["current"] = float(current_gain_B.mean())
            value = float(difference_B.mean())
        figures["difference"] = {
            "value": value,
            "error": standard_error(difference_B),
        }
    return figures


def standard_error(value_B: np.ndarray) -> float | None:
    """The standard error of the mean over users; None of fewer than two."""
    if len(value_B) < 2:
        return None
    return float(np.std(value_B, ddof=1) / math.sqrt(len(value_B)))


def one_sided_p(value: float, error: float | None, users: int) -> float:
    """The chance of a mean so low where the true one is 0: Student's t with users − 1 degrees.

    By Wallace's normal approximation of t (1959), good to 1 % of p. 1.0 where the error is not known.
    """
    freedom = users - 1
    if error is None or freedom < 1:
        return 1.0
    if error == 0:
        return 0.0 if value < 0 else 1.0
    t = value / error
    spread = math.sqrt(freedom * math.log1p(t * t / freedom))
    z = math.copysign(spread, t) * (8 * freedom + 1) / (8 * freedom + 3)
    return 0.5 * math.erfc(-z / math.sqrt(2))


def find_significant(p_values: Sequence[float], level: float) -> list[bool]:
    """Which tests of a family are significant at the family-wise level, by Holm's method.

    Of four tests at 0.05, which are compared with 0.05 / 4, 0.05 / 3, 0.05 / 2 and 0.05 in turn:

        p              0.30     0.001    0.016    0.04
        significant    False    True     True     False
    """
    significant = [False] * len(p_values)
    ascending = sorted(range(len(p_values)), key=lambda test: p_values[test])
    for place, test in enumerate(ascending):
        if p_values[test] > level / (len(p_values) - place):
            break
        significant[test] = True
    return significant


def judge(
    domains: dict[str, DomainRecord],
    rules: PublicationRules,
    min_users: int = 1,
    arrivals: dict[str, DomainRecord] | None = None,
) -> Judgement:
    """Judges a candidate by its figures. min_users: as `evaluation.min_users`.

    arrivals: `against_recency` of the day's prequential evaluation.

    With a tolerance of 2 %, a level of 0.05 and at least 50 users:

        domain   users    now    before   p       judgement
        shop     1,200    0.35   0.34     0.98    nothing
        video    2,000    0.30   0.34     0.001   a reason: fallen by more than 2 %, no chance
        books    90       0.20   0.22     0.31    a note: this may be chance
        docu     18       0.28   0.30     –       a note: too few users, it does not judge
    """
    users = {}
    for name, figures in domains.items():
        users[name] = figures["users"]
    counted = domains_of_mean(users, min_users)
    large = {name: domains[name] for name in counted}
    falls = _list_falls(large, rules)
    below = _list_below_recency(arrivals or {}, min_users)
    tests = [fall.describe() for fall in falls + below]
    warned: list[Fall] = []
    if rules.below_recency == REFUSE:
        falls += below
    else:
        warned, _ = _divide_falls(below, rules.level)
    refused, by_chance = _divide_falls(falls, rules.level)
    notes = []
    for fall in by_chance:
        notes.append(f"{fall.words}: this may be chance (p {fall.p:.2g})")
    for name in domains:
        if users[name] and name not in counted:
            notes.append(
                f"{name}: {users[name]:,} users, fewer than {min_users:,}: it does not judge"
            )
    if counted and max(users.values()) < min_users:
        notes.append(f"no domain has {min_users:,} users: all judge")
    return Judgement(
        reasons=[fall.words for fall in refused],
        notes=notes,
        tests=tests,
        warnings=[fall.words for fall in warned],
        below_recency=_names_below_recency(refused + warned),
    )


def _divide_falls(
    falls: list[Fall], level: float
) -> tuple[list[Fall], list[Fall]]:
    """Of a family of tests, the falls that are too large: those that are significant, and the others."""
    significant = find_significant([fall.p for fall in falls], level)
    no_chance = []
    by_chance = []
    for fall, is_significant in zip(falls, significant, strict=True):
        if not fall.is_too_large:
            continue
        if is_significant:
            no_chance.append(fall)
        else:
            by_chance.append(fall)
    return no_chance, by_chance


def _names_below_recency(falls: list[Fall]) -> list[str]:
    """The domains of the falls below recency popularity."""
    names = []
    for fall in falls:
        if fall.rule == _BELOW_RECENCY and fall.domain is not None:
            names.append(fall.domain)
    return names


def _list_below_recency(
    arrivals: dict[str, DomainRecord], min_users: int
) -> list[Fall]:
    """The served model beside recency popularity on the day's arrivals, by domain."""
    users = {}
    for name, figures in arrivals.items():
        users[name] = figures["users"]
    falls = []
    for name in domains_of_mean(users, min_users):
        figures = arrivals[name]
        now = figures["now"]
        before = figures["before"]
        words = (
            f"{name}: the model that served ranked the day's events with {HEADLINE} {now:.4f}, "
            f"recency popularity with {before:.4f}{_of_users(figures)}"
        )
        fall = Fall(
            _BELOW_RECENCY,
            name,
            now,
            before,
            figures["error"],
            users[name],
            0.0,
            words,
        )
        falls.append(fall)
    return falls


def _list_falls(
    domains: dict[str, DomainRecord], rules: PublicationRules
) -> list[Fall]:
    """All tests of the rules, also those of figures that have not fallen."""
    falls = []
    since = []
    for name, figures in domains.items():
        if figures["candidate"] is None or figures["current"] is None:
            continue
        falls.append(_against_current(name, figures, rules))
        if figures["when_published"]:
            fall = _since_published(name, figures, rules)
            falls.append(fall)
            since.append(fall)
    falls += _mean_fall(since, "fall", rules.fall, _words_of_mean)
    own = []
    for name, figures in domains.items():
        now = figures.get("own_item")
        then = figures.get("own_item_then")
        if now is not None and then is not None:
            own.append(_own_items(name, figures, rules))
    falls += [fall for fall in own if fall.before > 0]
    falls += _mean_fall(own, "own_fall", rules.own_fall, _words_of_own_items)
    return falls


def _against_current(
    name: str, figures: DomainRecord, rules: PublicationRules
) -> Fall:
    """The candidate beside the current model, over the same users."""
    now = figures["candidate"]
    before = figures["current"]
    words = (
        f"{name}: {HEADLINE} {now:.4f}, the current model has {before:.4f}"
        f"{_of_users(figures)}"
    )
    return Fall(
        "tolerance",
        name,
        now,
        before,
        figures["difference"]["error"],
        figures["users"],
        rules.tolerance,
        words,
    )


def _since_published(
    name: str, figures: DomainRecord, rules: PublicationRules
) -> Fall:
    """The candidate beside the figure with which the current model was published."""
    words = (
        f"{name}: {HEADLINE} {figures['candidate']:.4f}, "
        f"{figures['when_published']:.4f} {_WHEN}{_of_users(figures)}: {_UNLIKE}"
    )
    return _unpaired(
        "domain_fall",
        name,
        figures,
        ("candidate", "when_published"),
        rules.domain_fall,
        words,
    )


def _own_items(
    name: str, figures: DomainRecord, rules: PublicationRules
) -> Fall:
    """How much higher items rank for their own users than for others', beside then."""
    words = (
        f"{name}: a held-out item's {HEADLINE} is {figures['own_item']:.4f} higher for its own "
        f"user than for another's, it was {figures['own_item_then']:.4f} higher "
        f"{_WHEN}{_of_users(figures)}: items are not their users'"
    )
    return _unpaired(
        "own_fall",
        name,
        figures,
        ("own_item", "own_item_then"),
        rules.own_fall,
        words,
    )


def _unpaired(
    rule: str,
    name: str,
    figures: DomainRecord,
    keys: tuple[str, str],
    allowed: float,
    words: str,
) -> Fall:
    """A figure beside one of before, of other users. keys: of both; KEY_error is its error."""
    now, before = keys
    error = join_errors(figures[f"{now}_error"], figures[f"{before}_error"])
    return Fall(
        rule,
        name,
        figures[now],
        figures[before],
        error,
        figures["users"],
        allowed,
        words,
    )


def _of_users(figures: DomainRecord) -> str:
    return f" ({figures['users']:,} users)"


def join_errors(one: float | None, other: float | None) -> float | None:
    """The standard error of a difference of two figures of different users."""
    if one is None or other is None:
        return None
    return math.hypot(one, other)


def _mean_fall(
    falls: list[Fall], rule: str, allowed: float, words: Any
) -> list[Fall]:
    """The mean over domains; none where no domain has both figures, or there was none before."""
    if not falls:
        return []
    now = float(np.mean([fall.now for fall in falls]))
    before = float(np.mean([fall.before for fall in falls]))
    if before <= 0:
        return []
    error: float | None = 0.0
    for fall in falls:
        error = join_errors(error, fall.error)
    if error is not None:
        error /= len(falls)
    users = min(fall.users for fall in falls)
    text = words(falls, now, before)
    return [Fall(rule, None, now, before, error, users, allowed, text)]


def _words_of_mean(falls: list[Fall], now: float, before: float) -> str:
    words = []
    for fall in falls:
        percent = 100 * (fall.now / fall.before - 1)
        words.append(f"{fall.domain} {percent:+.0f} %")
    return (
        f"mean {HEADLINE} {now:.4f}, {before:.4f} {_WHEN}: {_UNLIKE} "
        f"({', '.join(words)})"
    )


def _words_of_own_items(falls: list[Fall], now: float, before: float) -> str:
    words = []
    for fall in falls:
        words.append(f"{fall.domain} {fall.now:.4f} after {fall.before:.4f}")
    return (
        f"a held-out item's {HEADLINE} is {now:.4f} higher for its own user than for "
        f"another's, it was {before:.4f} higher {_WHEN}: items are not their users' "
        f"({', '.join(words)})"
    )
