"""A probe that fails says why and ends no other; findings are shown with their size."""

import pytest
import torch

from benchmarks import environment


def failing(*_):
    raise RuntimeError("CUDA error: no kernel image is available")


def test_a_probe_that_fails_is_a_line():
    good = environment.probe("good", lambda size: {"size": size}, 3)
    bad = environment.probe("bad", failing)
    assert good["found"] == {"size": 3} and "error" not in good
    assert bad["error"].startswith("RuntimeError: CUDA error: no kernel")
    text = environment.table({"results": [good, bad]})
    assert "| good  |" in text and "size 3 |" in text
    assert "FAILED: RuntimeError: CUDA error: no kernel image" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.35e12, "3.35 T"),
        (5.1234e9, "5.123 G"),
        (47_000, "47 k"),
        (8, "8"),
        (0.000213, "0.000213"),
        (True, "yes"),
        (["a  b", "c"], "a b; c"),
        (None, "None"),
    ],
)
def test_a_finding_is_shown_with_its_size(value, text):
    assert environment.shown(value) == text


def test_the_table_is_probed_with_what_the_device_has():
    on_cpu = environment.table_kinds(torch.device("cpu"))
    assert on_cpu == [
        ("sgd", "auto"),
        ("adagrad", "auto"),
        ("rowwise_adagrad", "auto"),
    ]
    on_device = environment.table_kinds(torch.device("cuda"))
    assert ("adam", "cached") in on_device and len(on_device) == 10
