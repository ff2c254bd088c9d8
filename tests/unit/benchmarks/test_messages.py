"""What is reckoned for many ranks is the formula that is held against few; what is counted is by test_scaling.py."""

import pytest

from benchmarks import messages, traffic

SETTINGS = messages.Settings(
    [2], [64], users=4, reckoned_users=8, exponent=0.0, step=[]
)
COUNTED = {
    "ranks": 2,
    "model": {"dim": 16, "domains": 3, "weights": 1000, "zero_stage": 0, "candidates": 0,
              "communication": "fp32"},
    "rows": {"asked": 100.0, "foreign": 50.0},
    "parts": {
        "rows": {
            "collectives": 1.0, "bytes": 3200.0, "messages": 1.0,
            "formula": 3200.0, "kind": "all_to_all_single",
        },
        "clip, check, signals": {
            "collectives": 1.0, "bytes": 56.0, "messages": 2.0,
            "formula": 56.0, "kind": "all_reduce",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "world", "count"),
    [
        ("all_reduce", 64, 126),
        ("all_gather", 64, 63),
        ("all_to_all_single", 512, 511),
        ("all_reduce", 1, 0),
    ],
)
def test_a_collective_is_so_many_messages(kind, world, count):
    assert traffic.messages(kind, world) == count


def test_many_ranks_send_what_the_formula_says():
    column = messages.reckoned(SETTINGS, COUNTED, 64)
    assert column["rows"] == 200  # twice the users
    assert column["parts"]["rows"]["bytes"] == pytest.approx(
        200 * 63 / 64 * 4 * 16
    )
    assert column["parts"]["clip, check, signals"]["messages"] == 126
    assert column["parts"]["clip, check, signals"]["bytes"] == pytest.approx(
        2 * 63 / 64 * 7 * 8
    )


def test_the_table_has_every_part_and_the_agreement_that_there_was():
    record = {
        "settings": {"users": 4, "reckoned_users": 8},
        "counted": [COUNTED],
        "reckoned": [
            messages.reckoned(SETTINGS, COUNTED, ranks) for ranks in (64, 512)
        ],
    }
    shown = messages.table(record)
    assert "| rows" in shown and "3,200 (3,200)" in shown
    assert "agreement of its own" in shown and "1,022" in shown
    assert "all " in shown and "3,256" in shown


def test_a_sample_of_users_is_sent_alike_by_any_number_of_ranks():
    counted = COUNTED | {"model": COUNTED["model"] | {"candidates": 100}}
    mim = {
        "collectives": 2.0,
        "bytes": 1.0,
        "messages": 2.0,
        "formula": 1.0,
        "kind": "all_gather",
    }
    counted["parts"] = COUNTED["parts"] | {"SC-MIM": mim}
    few, many = (
        messages.reckoned(SETTINGS, counted, ranks)["parts"]["SC-MIM"]
        for ranks in (64, 512)
    )
    assert few["collectives"] == many["collectives"] == 1
    assert many["bytes"] == pytest.approx(2 * 4 * 3 * 100 * 16, rel=0.01)
    assert few["bytes"] == pytest.approx(many["bytes"], rel=0.02)
