import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from trainer.training.meters import IntervalMeter


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def batch(weights, interactions):
    return SimpleNamespace(
        weight_B=torch.tensor(weights), interactions=interactions
    )


def report(
    mutual_information=1.0,
    single=2.0,
    cross=3.0,
    by_domain=(4.0, 5.0),
    gaps=(6.0, 7.0),
    lambdas=(0.5, 0.5),
):
    # Sums are counted in float64, the rest is what the model computes in.
    return SimpleNamespace(
        mutual_information=torch.tensor(mutual_information),
        loss_single=torch.tensor(single, dtype=torch.float64),
        loss_cross=torch.tensor(cross, dtype=torch.float64),
        single_D=torch.tensor(by_domain, dtype=torch.float64),
        cross_D=torch.tensor(by_domain, dtype=torch.float64) + 1,
        phi_D=torch.tensor(gaps, dtype=torch.float64),
        lambda_D=torch.tensor(lambdas),
    )


def test_a_line_has_the_means_of_its_interval_and_the_newest_lambda(
    ranks, clock
):
    meter = IntervalMeter(["a", "b"])
    clock.seconds += 2
    nan = float("nan")
    meter.add(
        batch([1.0, 1.0, 0.0], 12),
        torch.tensor(3.0),
        report(single=1.0, by_domain=(1.0, nan), gaps=(2.0, nan)),
    )
    meter.add(
        batch([1.0], 5),
        torch.tensor(5.0),
        report(single=2.0, gaps=(4.0, nan), lambdas=(0.25, 0.75)),
    )
    clock.seconds += 2
    found = meter.record(2, 0)
    assert (found["step"], found["epoch"], found["seconds"]) == (2, 0, 4)
    assert (
        found["loss"],
        found["loss_single"],
        found["loss_cross"],
        found["mutual_information"],
    ) == (4, 1.5, 3, 1)
    assert found["single_by_domain"] == {
        "a": 2.5,
        "b": 5,
    }  # of the steps that have the domain
    assert found["cross_by_domain"] == {"a": 3.5, "b": 6}
    assert found["phi"]["a"] == 3 and math.isnan(found["phi"]["b"])
    assert found["lambda"] == {"a": 0.5, "b": 1.5}
    # A user that fills up is no user, and its two interactions are no tokens.
    assert (found["users_per_second"], found["tokens_per_second"]) == (
        3 / 4,
        15 / 4,
    )
    assert found["memory_gb"] > 0
    assert found["skipped_users"] == 0


def test_skipped_users_are_those_of_the_interval_over_all_ranks(
    ranks, clock, monkeypatch
):
    monkeypatch.setattr(
        dist, "all_reduce", lambda tensor: tensor.mul_(2)
    )  # another rank with the same figures
    meter = IntervalMeter(["a", "b"])
    found = []
    for interval in ([3, 0, 4], [0], [2]):
        for skipped in interval:
            meter.add(batch([1.0], 5), torch.tensor(5.0), report(), skipped)
        clock.seconds += 1
        found.append(meter.record(1, 0)["skipped_users"])
    assert found == [14, 0, 4] and all(type(users) is int for users in found)


def test_waiting_is_a_share_of_the_interval_and_pauses_are_not_in_it(
    ranks, clock
):
    meter = IntervalMeter(["a", "b"])
    for _ in range(2):  # the second interval starts anew
        with meter.waiting():
            clock.seconds += 1
        meter.add(batch([1.0], 5), torch.tensor(5.0), report())
        clock.seconds += 3
        with meter.paused():
            clock.seconds += 96
        found = meter.record(1, 0)
        assert (
            found["data_wait"] == 0.25 and found["tokens_per_second"] == 5 / 4
        )
    assert found["seconds"] == 200


def test_use_is_a_share_of_what_all_ranks_could_have_done(
    ranks, clock, monkeypatch
):
    # Another rank with the same figures.
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))

    class Work:
        peak = 100.0

        def add(self, batch):
            pass

        def take(self):
            return 60, 80, 500

    exchanged = iter([0.0, 5.0, 7.0, 9.0, 9.0])
    meter = IntervalMeter(["a", "b"], True, Work(), lambda: next(exchanged))
    meter.add(batch([1.0], 5), torch.tensor(5.0), report())
    clock.seconds += 20
    found = meter.record(1, 0)
    assert found["exchange"] == 5 / 20
    assert found["padding"] == 1 - 60 / 80
    assert found["mfu"] == 500 / (20 * 100)
    # The next interval begins anew.
    meter.add(batch([1.0], 5), torch.tensor(5.0), report())
    clock.seconds += 20
    assert meter.record(2, 0)["exchange"] == 2 / 20
