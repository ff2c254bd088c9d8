"""The model of a step's time: what it is fitted to it finds again, and its GPUs follow from the arithmetic beside it."""

import math
from dataclasses import replace

import pytest

from benchmarks.traffic import least
from trainer.planning import step_model, traffic
from trainer.planning.step_model import Cluster, Load, Point

KNOWN = {
    "fixed": 0.02,
    "per_token": 2e-4,
    "per_message": 3e-4,
    "per_byte": 1e-9,
    "exposed": 0.8,
}
CLUSTER = Cluster(
    gpus=[8, 16],
    per_host=8,
    inside_gbyte=400,
    between_gbit=[80],
    message_microseconds=10,
    peer_microseconds=1,
    users=256,
    tokens_per_second=[1e6],
    fp32_flops=1e13,
    imbalance=1.0,
)
LOAD = Load(
    tokens=1000,
    users=10,
    rows=900,
    domains=2,
    dim=32,
    weights=10_000,
    zero_stage=0,
)


def measured(parameters=KNOWN):
    """Points that are exactly as the parameters say."""
    points = []
    for tokens in (500, 1000, 2000):
        for messages, sent, bandwidth in (
            (0, 0, math.inf),
            (10, 4e6 + 1e3 * tokens, math.inf),
            (10, 4e6 + 1e3 * tokens, 1e8),
        ):
            point = Point(tokens, messages, sent, bandwidth, seconds=math.nan)
            points.append(
                replace(point, seconds=step_model.predict(parameters, point))
            )
    return points


def test_the_fit_finds_what_made_the_points():
    assert step_model.fit(measured()) == pytest.approx(KNOWN, rel=1e-6)
    assert step_model.left_out(measured()) == pytest.approx(
        [point.seconds for point in measured()]
    )


def test_no_parameter_is_negative_where_that_would_fit_better():
    found = step_model.fit(measured(KNOWN | {"per_message": -1e-3}))
    assert found["per_message"] == 0 and all(
        value >= 0 for value in found.values()
    )


def test_a_point_that_does_not_fit_shows_when_it_is_left_out():
    points = measured()
    points[4] = replace(points[4], seconds=2 * points[4].seconds)
    assert step_model.left_out(points)[4] == pytest.approx(
        measured()[4].seconds, rel=1e-6
    )


def test_one_host_needs_no_network_and_two_share_one_cable_each():
    step = step_model.cluster_step(LOAD, CLUSTER, 8, 80, 1e6)
    assert step == step_model.cluster_step(LOAD, CLUSTER, 8, 1e-3, 1e6)
    assert step["compute"] == pytest.approx(1e-3)
    assert step["dense"] == pytest.approx(2 * 7 / 8 * 40_000 / 400e9)
    step = step_model.cluster_step(LOAD, CLUSTER, 16, 80, 1e6)
    # 10 GB/s a host: the dense gradients pass it once, of a rank's rows those for the 8 of 16 ranks that are elsewhere.
    assert step["dense"] == pytest.approx(2 * 15 / 16 * 40_000 / 10e9)
    # So do the lengths of each rank's 2,048 bags, for the same 8 ranks.
    rows = 8 * 900 * 8 / 16 * (2 * 128 + 8)
    lengths = 8 * 8 * (2048 * 4 + 3 * 8)
    assert step["rows"] == pytest.approx((rows + lengths) / 10e9, rel=0.01)
    assert step["SC-MIM's pairs"] == pytest.approx(6 * 100 * 15 * 2 * 32 / 1e13)


@pytest.mark.parametrize(
    ("communication", "row", "gradient"),
    [
        ("fp32", 128, 128),
        ("bf16", 64, 64),
        ("int8", 40, 64),
    ],
)
def test_rows_travel_in_the_format_that_is_set(communication, row, gradient):
    found = traffic.expected(
        *(4, 32, 2, 3, 0, 0), foreign=50, communication=communication
    )
    assert found["rows"] == 50 * row
    assert found["row gradients"] == 50 * gradient


def test_with_a_copy_a_host_look_ups_need_no_network():
    """Two hosts: replicas halve the sums' work, and each tells the other all that it has summed."""
    copies = traffic.Copies(ranks=8, group_rows=4000, rows=6000)
    load = replace(LOAD, copies=copies)
    step = step_model.cluster_step(load, CLUSTER, 16, 80, 1e6)
    assert step["rows"] == pytest.approx(
        step_model.cluster_step(LOAD, CLUSTER, 8, 80, 1e6)["rows"]
    )
    rows = 4000 / 8 / 2 + 6000 / 16
    expected = 8 * (rows * (4 + 128) + 2 * 8) / 10e9
    assert step["copies"] == pytest.approx(expected)
    # One copy: 11 parts over 16 ranks; two: 4 over 8, 6 collectives over 2, the rest over 16.
    one = step_model.cluster_step(LOAD, CLUSTER, 16, 80, 1e6)["messages"]
    assert one == pytest.approx((9 * 4 * 10 + 5 * 16) * 1e-6)
    hops = 4 * 3 + 6 * 1 + 5 * 4
    peers = 5 * 8 + 6 * 2
    assert step["messages"] == pytest.approx((hops * 10 + peers) * 1e-6)


def test_sc_mim_within_ranks_takes_nothing_of_the_network():
    step = step_model.cluster_step(
        replace(LOAD, global_negatives=False), CLUSTER, 16, 80, 1e6
    )
    assert step["SC-MIM"] == step["SC-MIM's pairs"] == 0 < step["rows"]


def test_zero_stages_send_the_dense_weights_once_more():
    def dense(stage):
        found = traffic.expected(
            4, 8, 2, users=3, weights=1000, zero_stage=stage, foreign=50
        )
        return sum(
            found.get(part, 0) for part in ("dense gradients", "dense weights")
        )

    assert dense(0) == 2 * 3 / 4 * 4000 and dense(1) == 3 * 3 / 4 * 4000
    assert (
        traffic.expected(
            1, 8, 2, users=3, weights=1000, zero_stage=1, foreign=0
        )
        == {}
    )


def test_the_least_is_distinct_rows_there_and_back_and_the_dense_reduction():
    assert (
        least(2, 8, weights=100, distinct_foreign=10) == 10 * (4 + 2 * 32) + 400
    )
