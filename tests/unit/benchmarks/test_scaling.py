"""Real ranks send what the formula says, and the script measures, counts, fits and draws."""

import json
import os
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks import chart, namespaces, scaling, suite
from benchmarks.groups import Group
from benchmarks.workload import dataset_of, draw
from tests.helpers.rank_processes import forked_python
from trainer.config.negatives import NegativesConfig
from trainer.planning.traffic import count_collectives

SMALL = [
    "items=600",
    "domains=3",
    "users=[4,8]",
    "volume_users=4",
    "shortest=4",
    "steps=1",
    "rounds=1",
    "exponents=[1.0,0.0]",
    "gbit=[1]",
    "cluster.gpus=[8,16]",
    "model.dim=16",
    "model.max_length=16",
    "model.experts=3",
    "model.cross_experts=2",
    "model.ffn_dim=16",
]


def record_of(group, settings):
    """What `scaling.volumes` counts of a group of local ranks."""

    class Here:
        pair, apart, hosts = group, None, None

        def limit(self, gbit):
            assert gbit is None

    return scaling.volumes(Here(), settings, group.ask("model")[0])


@pytest.fixture
def forked(monkeypatch):
    """Ranks are forked where the stack is loaded."""
    monkeypatch.setattr(sys, "executable", forked_python())


@pytest.mark.ranks
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_send_what_the_formula_says(stage, tmp_path):
    arguments = ["--short", *SMALL, f"optimizer.zero_stage={stage}"]
    settings, _ = suite.settings("scaling", scaling.Settings, arguments)
    cores = sorted(os.sched_getaffinity(0))
    group = Group(tmp_path, "pair", [cores[0], cores[-1]], arguments)
    try:
        assert [answer["there"] for answer in group.hear()] == [0, 1]
        popular, even = record_of(group, settings)
        timed = group.ask("steps", users=4, steps=2)
    finally:
        group.end()
    assert {len(answer["seconds"]) for answer in timed} == {2} and timed[0][
        "tokens"
    ] == 40
    by_part = count_collectives(2, 4, 0)
    for counted in (popular, even):
        assert set(counted["parts"]) >= {
            "ids",
            "rows",
            "row gradients",
            "SC-MIM",
            "SC-MIM gradients",
            "dense gradients",
        }
        for name, part in counted["parts"].items():
            # The dense weights are filled up to equal parts; of what TorchRec agrees on, the formula has the numbers.
            assert part["called"] == pytest.approx(
                part["expected"], rel=0.01, abs=32
            ), name
            assert part["calls"] > 0 and part["wire"] is None
            if name in by_part:
                assert part["calls"] == by_part[name][1], name
        assert counted["called"] > counted["least"]
    assert popular["distinct"] < even["distinct"]


@pytest.mark.ranks
@pytest.mark.usefixtures("forked")
def test_a_rank_that_dies_is_reported_with_its_last_words(tmp_path):
    group = Group(
        tmp_path,
        "broken",
        [sorted(os.sched_getaffinity(0))[0]],
        ["--short", "items=1"],
    )
    try:
        with pytest.raises(
            RuntimeError,
            match=r"broken: a rank gave no answer(.|\n)*items is 1: give at least",
        ):
            group.hear()
    finally:
        group.end()


@pytest.mark.slow
def test_hosts_are_counted_on_the_wire_and_everything_is_written(
    monkeypatch, tmp_path, capsys
):
    if reason := namespaces.why_no_limit():
        pytest.skip(reason)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "scaling.py",
            "--short",
            "--json",
            str(tmp_path / "scaling.json"),
            *SMALL,
        ],
    )
    scaling.main()
    record = json.loads((tmp_path / "scaling.json").read_text())
    cases = {step["case"] for step in record["steps"]}
    assert cases == {
        "one rank",
        "two apart",
        "two ranks",
        "two hosts",
        "two hosts, 1 Gbit/s",
    }
    assert len(record["steps"]) == 10 and all(
        step["seconds"]["min"] > 0 for step in record["steps"]
    )
    assert (
        record["links"]["two hosts, 1 Gbit/s"]["all_reduce"] < 1.1e9 / 8
    )  # the token bucket is full at first
    for counted in record["volume"]:
        assert counted["wire"] == pytest.approx(counted["called"], rel=0.1)
        for name in ("rows", "row gradients", "dense gradients"):
            part = counted["parts"][name]
            assert part["wire"] == pytest.approx(part["called"], rel=0.1), name
    assert set(record["fit"]["parameters"]) == {
        "fixed",
        "per_token",
        "per_message",
        "per_byte",
        "exposed",
    }
    assert len(record["fit"]["points"]) == 8
    table = capsys.readouterr().out
    assert (
        "two hosts, 1 Gbit/s" in table
        and "on the wire" in table
        and "Fitted: " in table
    )
    ElementTree.parse(tmp_path / "scaling.svg")


def test_popular_items_are_drawn_by_zipfs_law():
    dataset = dataset_of(3000, 3, users=400, steps=1)
    items_N, _, domain_N, _, _ = draw(
        dataset, 0, 400, 100, 100, NegativesConfig(shared=0), exponent=1.0
    )
    rank_N = items_N - dataset.starts[domain_N]
    assert (dataset.domain_of(items_N) == domain_N).all()
    share = 1 / (1 / np.arange(1, 1001)).sum()
    assert np.isclose((rank_N == 0).mean(), share, rtol=0.05)
    assert np.isclose((rank_N == 9).mean(), share / 10, rtol=0.15)
    even_N, _, domain_N, _, _ = draw(
        dataset, 0, 400, 100, 100, NegativesConfig(shared=0)
    )
    assert np.isclose(
        (even_N == dataset.starts[domain_N]).mean(), 1e-3, atol=5e-4
    )


def test_a_chart_has_every_value_where_it_belongs():
    lines = chart.Panel(
        "a < b",
        ["8", "16"],
        {"one": [100.0, 50.0], "two": [80.0, 0.0]},
        "GPUs",
        "%",
        {"one": [90.0, 40.0]},
        top=100,
    )
    bars = chart.Panel(
        "bars",
        ["8", "16"],
        {"one": [1.0, 2.0], "two": [3.0, 2.0]},
        "GPUs",
        "ms",
        stacked=True,
    )
    root = ElementTree.fromstring(chart.svg([lines, bars]))
    name = "{http://www.w3.org/2000/svg}"
    assert [
        len(line.get("points").split())
        for line in root.findall(f".//{name}polyline")
    ] == [2, 2, 2, 0]
    heights = [
        float(circle.get("cy")) for circle in root.findall(f".//{name}circle")
    ]
    assert (
        heights[0]
        < heights[2]
        < heights[4]
        < heights[1]
        < heights[3]
        < heights[5]
    )
    stacked = [
        rect
        for rect in root.findall(f".//{name}rect")
        if rect.find(f"{name}title") is not None
    ]
    size = [float(rect.get("height")) for rect in stacked]
    assert size[0] + size[2] == pytest.approx(size[1] + size[3], abs=0.2)
    assert float(stacked[2].get("y")) + size[2] == pytest.approx(
        float(stacked[0].get("y")), abs=0.2
    )
