"""The rounds in which hosts meet."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trainer.doctor.network_probe import pair_rounds


@given(st.integers(1, 40))
def test_every_two_hosts_meet_once_and_nobody_twice_in_a_round(count):
    rounds = pair_rounds(count)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(count), 2))
    for pairs in rounds:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))
    assert len(rounds) <= count
