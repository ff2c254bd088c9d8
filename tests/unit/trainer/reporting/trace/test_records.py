"""Files of phases, written and read back."""

import json

import pytest

from trainer.errors import InputError
from trainer.reporting.trace.records import PhaseWriter, read_phases
from trainer.run_files import phases_file


def write_steps(run, rank=0, world_size=1, steps=(1, 2)):
    writer = PhaseWriter(run, rank, world_size, "cpu")
    moment = 0.0
    writer.listen("between", moment)
    for step in steps:
        writer.listen("forward", moment + 0.001)
        writer.listen("sums", moment + 0.003)
        writer.listen("between", moment + 0.004)
        writer.end_step(step)
        moment += 0.004
    writer.close()


def test_what_is_written_is_read(tmp_path):
    write_steps(tmp_path)
    (rank,) = read_phases(tmp_path)
    assert (rank.rank, rank.world_size, rank.device) == (0, 1, "cpu")
    for step in (1, 2):
        spans = [
            (span.phase, round(1000 * span.seconds, 2))
            for span in rank.steps[step]
        ]
        assert spans == [("between", 1.0), ("forward", 2.0), ("sums", 1.0)]
    # Nothing is missing between the lines of two steps.
    assert rank.steps[2][0].begin == pytest.approx(rank.steps[1][-1].end)


def test_nothing_is_written_without_a_step(tmp_path):
    writer = PhaseWriter(tmp_path, 0, 1, "cpu")
    writer.listen("between", 0.0)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    write_steps(tmp_path)
    with (tmp_path / phases_file(0)).open("a") as file:
        file.write(
            '7\n{"step": 3}\n{"step": 4, "time": 1, "spans": [["x", 0, 1]]}'
        )
        file.write('\n{"step": 5, "time": 1.0, "sp')
    (rank,) = read_phases(tmp_path)
    assert list(rank.steps) == [1, 2]


def test_ranks_of_an_earlier_attempt_are_passed_over(tmp_path):
    for rank in range(4):
        write_steps(tmp_path, rank, 4)
    for rank in range(2):
        write_steps(tmp_path, rank, 2, steps=(9,))
    ranks = read_phases(tmp_path)
    assert [list(rank.steps) for rank in ranks] == [[9], [9]]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda run: (run / phases_file(0)).unlink(),
            r"phases: has no rank-00000\.jsonl: train with profile\.phases=true",
        ),
        (
            lambda run: (run / phases_file(1)).unlink(),
            r"rank-00001\.jsonl: not found, and the run had 2 ranks: copy",
        ),
        (
            lambda run: (run / phases_file(1)).write_text(
                json.dumps({"rank": 0})
            ),
            r"rank-00001\.jsonl: its first line is not that of rank 1's",
        ),
        (
            lambda run: (run / phases_file(1)).write_text(""),
            r"rank-00001\.jsonl: its first line is not that of rank 1's",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, reason):
    for rank in range(2):
        write_steps(tmp_path, rank, 2)
    spoil(tmp_path)
    with pytest.raises(InputError, match=reason):
        read_phases(tmp_path)
