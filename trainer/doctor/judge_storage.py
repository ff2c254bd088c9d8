"""Verdicts on what hosts see of the dataset and of the run's folder.

A function fills a check, and returns what is said where nothing is amiss.
"""

import statistics

from embeddings.placement import format_size
from trainer.doctor.facts import Examination, FolderFacts, RankFacts
from trainer.doctor.units import format_duration
from trainer.doctor.verdict import Check

_LATE = 1.0  # seconds of a listing
_SLOW = 0.5  # of the median

_ONE_FOLDER = "run=DIR has to be one folder, which all hosts see"
_ALLOW = "give this user the right, or another run=DIR"
_LATE_IS_WAITED_FOR = (
    "a run waits for them (docs/clusters.md); actimeo=1 shortens it"
)
_WITH_LOCKS = "mount with flock, or see to it that one run writes there"
_LOOK_AT_DISK = "look at its disk or mount, or copy the dataset there"


def judge_data(check: Check, found: Examination) -> str:
    """Whether all hosts have the dataset, and the same.

    host1: /data/shop is not a dataset folder: …; other hosts have it, mount or copy it there
    host1: has another dataset (9a01c2f3b4d5, not 5f0c5f0c5f0c): give all the same
    """
    if found.data is None:
        check.skip("give data=DIR")
        return ""
    usual = ""
    for data in found.data:
        usual = usual or data.fingerprint
    short = usual[:12]
    for host, rank in found.leaders.items():
        data = found.data[rank.rank]
        mine = data.fingerprint[:12]
        if data.problem and usual:
            # The dataset's error ends in its own way out.
            elsewhere = "other hosts have it, mount or copy it there"
            check.fault(host, f"{data.problem}; {elsewhere}")
        elif data.problem:
            check.fault(host, data.problem)
        elif mine != short:
            other = f"has another dataset ({mine}, not {short})"
            check.fault(host, other, "give all the same")
    return f"the same on all hosts ({short})"


def judge_run_folder(check: Check, found: Examination) -> str:
    """Whether hosts can write in the run's folder, and see each other there.

    host1: not shared, host1 does not see within 5.0 s what host0 writes there: run=DIR has …
    host1: cannot be written (Read-only file system): give this user the right, or another …
    host1: lists new files after 3.0 s: a run waits for them (docs/clusters.md); …
    """
    if found.folder is None:
        check.skip("give run=DIR")
        return ""
    latest = 0.0
    for rank in found.leaders.values():
        facts = found.folder[rank.rank]
        _judge_view(check, rank, facts, found)
        latest = max(latest, facts.listed or 0.0)
    free = format_size(found.folder[0].free)
    if len(found.leaders) == 1:
        return f"written and renamed in, {free} free"
    when = format_duration(latest)
    return f"seen by all hosts, listed after {when}, {free} free"


def _judge_view(
    check: Check,
    rank: RankFacts,
    facts: FolderFacts,
    found: Examination,
) -> None:
    """One host's view of the run's folder."""
    first = found.first_host
    patience = format_duration(found.patience)
    unseen = ""
    if facts.seen is None:
        unseen = f"{rank.host} does not see within {patience} what {first}"
    elif not facts.heard:
        unseen = f"{first} does not see within {patience} what {rank.host}"
    if unseen:
        text = f"not shared, {unseen} writes there"
        check.fault(rank.host, text, _ONE_FOLDER)
    elif facts.problem:
        check.fault(rank.host, f"cannot be written ({facts.problem})", _ALLOW)
    elif facts.listed is None:
        text = f"lists new files not within {patience}"
        check.warn(rank.host, text, _LATE_IS_WAITED_FOR)
    elif facts.listed > _LATE:
        when = format_duration(facts.listed)
        text = f"lists new files after {when}"
        check.warn(rank.host, text, _LATE_IS_WAITED_FOR)


def judge_locks(check: Check, found: Examination) -> str:
    """Whether the first rank's lock holds on the other hosts.

    host1: a lock of host0 does not hold there: mount with flock, or see to it that one run …
    """
    if found.folder is None:
        check.skip("give run=DIR")
        return ""
    tried = 0
    for host, rank in found.leaders.items():
        facts = found.folder[rank.rank]
        if facts.seen is None or facts.problem or rank.rank == 0:
            continue
        tried += 1
        if facts.lock == "free":
            text = f"a lock of {found.first_host} does not hold there"
            check.warn(host, text, _WITH_LOCKS)
        elif facts.lock == "none":
            check.warn(host, "the file system has no locks", _WITH_LOCKS)
    if len(found.leaders) == 1:
        check.skip("one host")
    elif not tried:
        check.skip("the folder is not shared")
    return "hold on all hosts"


def judge_reading(check: Check, found: Examination) -> str:
    """How fast hosts read shards, all at once; one that is far below the others is warned of.

    host2: 1.0 MB/s, the median is 100.0 MB/s: look at its disk or mount, or copy the …
    """
    if found.data is None:
        check.skip("give data=DIR")
        return ""
    rates: dict[str, float] = {}
    users = 0.0
    for rank, data in zip(found.ranks, found.data, strict=True):
        users += data.read_users
        if data.read_bytes:
            rates.setdefault(rank.host, 0.0)
            rates[rank.host] += data.read_bytes
    if not rates:
        check.skip("no host could read any")
        return ""
    median = statistics.median(rates.values())
    usual = format_size(median)
    for host, rate in rates.items():
        if rate < _SLOW * median:
            slow = format_size(rate)
            text = f"{slow}/s, the median is {usual}/s"
            check.warn(host, text, _LOOK_AT_DISK)
    whole = format_size(sum(rates.values()))
    return f"{usual}/s a host; {whole}/s and {users:,.0f} users/s in all"
