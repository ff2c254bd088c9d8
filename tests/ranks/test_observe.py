"""What two ranks leave of their own speed: phases, a trace each, shares of all ranks, one file for Prometheus."""

from tests.ranks.conftest import MODEL, SETTINGS, ranks_of, run
from trainer.reporting.run_log import read_records
from trainer.reporting.trace.page import write_trace
from trainer.reporting.trace.phases import GRADIENTS, SUMS
from trainer.reporting.trace.records import read_phases
from trainer.reporting.trace.waiting import find_waits

OWN = [
    "profile.phases=true",
    "profile.steps=2",
    "profile.peak_tflops=0.1",
]


def test_two_ranks_show_who_waits_for_whom(dataset, tmp_path):
    folder = tmp_path / "run"
    exporter = tmp_path / "syncrec.prom"
    words = [f"data={dataset}", f"run={folder}", *SETTINGS, *MODEL, *OWN]
    words.append(f"log.prometheus={exporter}")
    done = run(ranks_of(2, "launch/train.py", *words))
    assert done.stdout.count("operators of steps 2 to 2, rank 0") == 1
    traces = [file.name for file in (folder / "profile").glob("*.json.gz")]
    assert sorted(traces) == [
        f"steps-2-2-rank-0000{rank}.trace.json.gz" for rank in (0, 1)
    ]
    ranks = read_phases(folder)
    assert [list(rank.steps) for rank in ranks] == [[1, 2, 3]] * 2
    waits = [wait for step in (1, 2, 3) for wait in find_waits(ranks, step)]
    # Of each exchange one of the two waits, and nobody for itself.
    assert {SUMS, GRADIENTS} <= {wait.phase for wait in waits}
    assert all({wait.rank, wait.other} == {0, 1} for wait in waits)
    assert "2 ranks" in write_trace(folder).read_text()
    for record in read_records(folder / "metrics.jsonl"):
        if record["kind"] == "train":
            assert 0 < record["exchange"] < 1
            assert 0 <= record["padding"] < 1
            assert record["mfu"] > 0
    assert 'syncrec_total_steps{run="run"} 3\n' in exporter.read_text()
