"""Verdicts on clocks, links and collectives.

A function fills a check, and returns what is said where nothing is amiss.
"""

import statistics

from trainer.doctor.facts import Examination, Link
from trainer.doctor.units import count_of, format_duration, format_rate
from trainer.doctor.verdict import Check

_CLOCK_FAULT = 60.0  # seconds
_CLOCK_WARNING = 1.0
_SLOW = 0.5  # of the median
_GIGABIT = 1e9 / 8  # bytes

_SET_CLOCK = "set it (chronyc makestep, timedatectl set-ntp true)"
_MEND_LINK = (
    "look at its cable, switch and GLOO_SOCKET_IFNAME, or allow less by "
    "--min-gbit"
)
_ALL_WAIT = "look at its cable and switch: all wait for the slowest"


def judge_clocks(check: Check, found: Examination) -> str:
    """Clocks against the first rank's.

    host1: its clock is 60 min ahead of host0's: set it (chronyc makestep, timedatectl …
    """
    if len(found.leaders) == 1:
        check.skip("one host")
        return ""
    most = 0.0
    for host, ahead in found.clocks.items():
        off = abs(ahead)
        most = max(most, off)
        way = "ahead of" if ahead > 0 else "behind"
        by = format_duration(off)
        text = f"its clock is {by} {way} {found.first_host}'s"
        if off >= _CLOCK_FAULT:
            check.fault(host, text, _SET_CLOCK)
        elif off >= _CLOCK_WARNING:
            check.warn(host, text, _SET_CLOCK)
    within = format_duration(most)
    return f"within {within} of {found.first_host}'s"


def judge_links(check: Check, found: Examination) -> str:
    """Pairs of hosts, the slowest first.

    host0 – host2: 20 Mbit/s, 50 µs, less than 1 Gbit/s: look at its cable, switch …
    host1 – host2: 4 Gbit/s, 50 µs, the median is 9.6 Gbit/s: look at its cable and switch: …
    """
    links = sorted(found.links, key=lambda link: link.bandwidth)
    if not links:
        check.skip("one host")
        return ""
    median = statistics.median(link.bandwidth for link in links)
    usual = format_rate(median)
    need = found.need_gbit
    for link in links:
        pair = " – ".join(link.hosts)
        measured = _describe(link)
        if link.bandwidth < need * _GIGABIT:
            text = f"{measured}, less than {need:g} Gbit/s"
            check.fault(pair, text, _MEND_LINK)
        elif link.bandwidth < _SLOW * median:
            text = f"{measured}, the median is {usual}"
            check.warn(pair, text, _ALL_WAIT)
    pairs = count_of(len(links), "pair")
    slowest = " – ".join(links[0].hosts)
    measured = _describe(links[0])
    return f"slowest of {pairs}: {slowest}, {measured}"


def _describe(link: Link) -> str:
    """`9.41 Gbit/s, 145 µs`."""
    rate = format_rate(link.bandwidth)
    latency = format_duration(link.latency)
    return f"{rate}, {latency}"


def judge_collective(check: Check, found: Examination) -> str:
    """The collective that the check is named after: `a rank sends 4.4 Gbit/s; a small …`."""
    for collective in found.collectives:
        if collective.name == check.name:
            rate = format_rate(collective.bandwidth)
            small = format_duration(collective.latency)
            return f"a rank sends {rate}; a small one takes {small}"
    check.skip("one rank")
    return ""
