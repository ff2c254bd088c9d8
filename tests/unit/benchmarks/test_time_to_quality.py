"""Seconds are those of each system's own curve, and peers train on what ours trains on. Peers' environments may be missing here."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import suite, time_to_quality
from benchmarks.time_to_quality import ROOT, Settings
from trainer.study.peers.recbole_bridge import default_python
from trainer.study.peers.rectools_bridge import default_rectools_python


def settings_of(*given):
    return suite.settings(
        "time_to_quality", Settings, ["systems=[SASRec]", *given]
    )[0]


def result(system, values, wall, training, split="leave_one_out", **more):
    """A system whose validations are `values`, each after so many more seconds."""
    curve = [
        {
            "epoch": epoch,
            "wall_seconds": wall * (epoch + 1),
            "training_seconds": training * (epoch + 1),
            "cpu_seconds": 2 * wall * (epoch + 1),
            "validation": value,
        }
        for epoch, value in enumerate(values)
    ]
    made = {
        "log": "shop",
        "split": split,
        "system": system,
        "cores": 2,
        "load_before": 0.1,
        "curve": curve,
        "best_epoch": values.index(max(values)),
        "test": 0.25,
        "stopped": "patience",
        "interactions_per_second": 1234.5,
        "memory_bytes": 2e9,
    }
    return made | more


OURS = result("SASRec", [0.20, 0.30, 0.33, 0.32], 10, 4)
WORSE = result("RecBole SASRec", [0.10, 0.20], 900, 800)
BEST = result("RecTools eSASRec", [0.20, 0.27, 0.30], 100, 70)


def cells(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_seconds_are_to_the_first_point_at_the_level():
    assert time_to_quality.seconds_to(OURS, 0.30, "wall") == 20
    assert time_to_quality.seconds_to(OURS, 0.31, "training") == 12
    assert time_to_quality.seconds_to(OURS, 0.34, "wall") is None


def test_a_table_times_each_to_its_own_best_and_to_that_of_the_best_peer():
    record = {"results": [OURS, WORSE, BEST]}
    text = time_to_quality.table(record)
    header, _, ours, worse, best = cells(text)
    assert "2 cores; load before a system was started 0.1 to 0.1" in text
    place = header.index("s to 95 % of its own best: wall, training, CPU")
    # 0.3135, 0.19 and 0.285 of their own; 0.285 of the best peer's.
    assert ours[place : place + 3] == [
        "30 / 12 / 60",
        "20 / 8 / 40",
        "0.07 / 0.07",
    ]
    own = "1,800 / 1,600 / 3,600"
    assert worse[place : place + 3] == [own, "not reached", ""]
    own = "300 / 210 / 600"
    assert best[place : place + 3] == [own, own, "1.00 / 1.00"]
    assert ours[1:5] == ["0.3300", "0.2500", "3", "4 (patience)"]
    assert ours[-2:] == ["1,234", "2.0 GB"]


def test_each_split_has_its_own_best_peer_a_table_and_a_panel():
    by_time = [
        result("SASRec", [0.1], 5, 4, "timeline"),
        result("RecBole SASRec", [0.1, 0.2], 9, 8, "timeline"),
    ]
    record = {"results": [OURS, BEST, *by_time]}
    text = time_to_quality.table(record)
    assert "shop, leave-one-out" in text and "shop, timeline" in text
    assert cells(text)[-1][-3] == "1.00 / 1.00"
    drawn = time_to_quality.chart(record)
    ElementTree.fromstring(drawn)
    assert drawn.count("<polyline") == 4
    # A circle a point.
    assert drawn.count("<circle") == 4 + 3 + 1 + 2


def test_without_peers_there_is_nothing_to_compare_with():
    record = {"results": [OURS]}
    (header, _, ours) = cells(time_to_quality.table(record))
    assert "of the best peer's: wall, CPU" not in header and ours[0] == "SASRec"
    ElementTree.fromstring(time_to_quality.chart(record))


def test_time_of_validations_is_of_the_wall_and_not_of_the_training():
    mean = {"NDCG@10": 0.2}
    validations = [
        {"epoch": 0, "seconds": 30, "validation_seconds": 10, "mean": mean},
        {"epoch": 1, "seconds": 65, "validation_seconds": 15, "mean": mean},
    ]
    ours = time_to_quality.our_curve(validations, 7)
    assert [point["wall_seconds"] for point in ours] == [37, 72]
    assert [point["training_seconds"] for point in ours] == [20, 40]
    epochs = [
        {"epoch": 0, "seconds": 30, "training_seconds": 20, "validation": 0.2},
        {"epoch": 1, "seconds": 65, "training_seconds": 20, "validation": 0.2},
    ]
    found = {"epochs": epochs, "start_up_seconds": 7}
    assert time_to_quality.peer_curve(found) == ours
    assert time_to_quality.rate(100, ours) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["systems=[SASRek]"], "systems has SASRek, which is none of SASRec,"),
        (
            [
                "systems=[RecTools SASRec]",
                "rectools_python=nowhere/bin/python",
            ],
            "RecTools SASRec needs python in nowhere, which is not there: make peers",
        ),
        (["logs=null", "users=0"], "logs"),
    ],
)
def test_bad_settings_are_one_line(given, message, capsys):
    with pytest.raises(SystemExit):
        settings_of(*given)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_arguments_of_ours_are_the_presets_and_the_splits(tmp_path):
    work = object.__new__(time_to_quality.Work)
    work.settings = settings_of("epochs=3", "seed=4")
    work.log = "amazon4"
    assert work._task("leave_one_out", "SyNCRec") == {
        "arguments": ["--config=amazon4", "seed=4", "epochs=3"]
    }
    timeline = work._task("timeline", "SyNCRec")["arguments"]
    assert timeline[:2] == ["--config=amazon4", "--config=timeline"]
    assert "split.kind=timeline" in timeline
    work.log = "ml1m"
    assert work._task("leave_one_out", "SyNCRec")["arguments"][0] == (
        "--config=default"
    )
    peer = work._task("timeline", "RecTools eSASRec")
    assert peer["options"]["loss"] == "sampled_softmax"
    assert peer["options"]["transformer_layers_type"].endswith("LiGRLayers")
    assert (
        "transformer_layers_type"
        not in (work._task("timeline", "RecTools SASRec")["options"])
    )
    assert (peer["epochs"], peer["min_users"], peer["evaluation_seed"]) == (
        3,
        50,
        4,
    )


def test_the_domains_of_a_peers_test_are_those_of_the_validation():
    handed = SimpleNamespace(
        load={"candidates-validation": np.array([[0], [1], [2], [8]])}.get,
        domain_of=lambda rows: rows // 8,
    )
    ranks = {
        "sampled": np.array([1, 3, 1, 1]),
        "domain": np.array([0, 0, 1, 1]),
    }
    mean = time_to_quality.mean_of_test(handed, ranks, 3)
    assert mean == pytest.approx((1 + 0.5) / 2)
    mean = time_to_quality.mean_of_test(handed, ranks, 1)
    assert mean == pytest.approx((0.75 + 1) / 2)


@pytest.mark.ranks
def test_what_children_compute_is_counted_and_what_others_do_is_not():
    loop = "import time\nwhile time.process_time() < 0.6: pass\nprint(flush=True)\ninput()"
    # A child's child, as a loader's process is.
    shell = f"{sys.executable} -c '{loop}'; true"
    with time_to_quality.CpuClock() as clock:
        begun = time.time()
        child = subprocess.Popen(
            ["sh", "-c", shell],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        child.stdout.readline()
        time.sleep(3 * time_to_quality._LOOKS)
        ended = time.time()
        child.communicate("\n")
    assert clock.seconds_at(begun - 9) == 0
    assert 0.55 < clock.seconds_at(ended) < 3


def test_what_was_measured_is_not_measured_again(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return len(calls)

    file = tmp_path / "a.json"
    assert suite.once(file, {"a": 1}, measure) == 1
    assert suite.once(file, {"a": 1}, measure) == 1
    assert suite.once(file, {"a": 2}, measure) == 2


@pytest.mark.slow  # ten processes that import PyTorch
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (default_python().is_file() and default_rectools_python().is_file()),
    reason=f"an environment is not there, {default_python()} or {default_rectools_python()}: make peers",
)
def test_the_short_form_measures_every_system_on_both_splits(
    tmp_path, monkeypatch
):
    file = tmp_path / "result.json"
    given = [
        f"folder={tmp_path}",
        f"recbole_python={default_python()}",
        f"rectools_python={default_rectools_python()}",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["time_to_quality.py", "--short", "--json", str(file), *given],
    )
    monkeypatch.chdir(ROOT)
    time_to_quality.main()
    record = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    results = record["results"]
    assert len(results) == 10
    for found in results:
        curve = found["curve"]
        assert len(curve) <= 2 and found["interactions_per_second"] > 0
        assert found["start_up_seconds"] > 0 and found["memory_bytes"] > 1e8
        assert all(
            0 < point["training_seconds"] < point["wall_seconds"]
            and point["cpu_seconds"] > 0
            and 0 < point["validation"] < 1
            for point in curve
        )
    for split in ("leave_one_out", "timeline"):
        predicted = {
            found["system"]: found["interactions_per_epoch"]
            for found in results
            if found["split"] == split
        }
        assert predicted["SASRec"] == predicted["SyNCRec"]
        # Its first interaction no peer predicts; RecBole makes a sample of every prefix.
        assert predicted["RecTools SASRec"] < predicted["SASRec"]
        assert predicted["RecBole SASRec"] >= predicted["RecTools SASRec"]
    ElementTree.parse(file.with_suffix(".svg"))
