"""What is said of runs of two precisions."""

import pytest

from benchmarks import precision


def run(kind, seed, losses, test):
    return {
        "precision": kind,
        "seed": seed,
        "steps": [25 * (i + 1) for i in range(8)],
        "losses": losses,
        "test": test,
    }


RUNS = [
    run("fp32", 0, [9, 8, 7, 6, 5, 4, 3.0, 2.0], 0.30),
    run("fp32", 1, [9, 8, 7, 6, 5, 4, 3.4, 2.2], 0.32),
    run("bf16", 0, [5, 5, 5, 5, 5, 5, 3.1, 2.0], 0.31),
    run("bf16", 1, [9, 8, 7, 6, 5, 4, 3.4, 2.1], 0.31),
]


def test_the_distance_is_of_the_last_quarter():
    assert precision.distance(RUNS[0], RUNS[1]) == pytest.approx(0.3)
    assert precision.distance(RUNS[0], RUNS[2]) == pytest.approx(0.05)


def test_the_table_has_both_precisions_and_the_noise():
    text = precision.table({"results": RUNS})
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert rows[1] == [
        "fp32",
        "2.6500",
        "2.5000, 2.8000",
        "0.3100",
        "0.3000, 0.3200",
    ]
    assert rows[2][0] == "bf16" and rows[2][3] == "0.3100"
    assert (
        "two seeds of fp32: 0.3000; bf16 and fp32, same seed: 0.0500." in text
    )


def test_the_picture_has_a_line_for_each_run():
    assert precision.picture({"results": RUNS}).count("<polyline") == 4
