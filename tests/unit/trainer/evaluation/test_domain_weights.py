"""λ on one scale, whichever it was recorded in."""

import math

import pytest

from trainer.evaluation.domain_weights import relative_weights


@pytest.mark.parametrize("total", [1.0, 3.0, 1 / 7])
def test_equal_weights_are_one_in_every_scale(total):
    weights = dict.fromkeys("abc", total / 3)
    assert relative_weights(weights) == pytest.approx(dict.fromkeys("abc", 1))


def test_the_total_does_not_matter_and_the_proportions_stay():
    for scale in (1, 3):
        given = {"a": 0.5 * scale, "b": 0.3 * scale, "c": 0.2 * scale}
        assert relative_weights(given) == pytest.approx(
            {"a": 1.5, "b": 0.9, "c": 0.6}
        )


def test_relative_weights_come_back_to_the_bit():
    once = relative_weights({"a": 0.123456789, "b": 0.7, "c": 0.17654321})
    assert relative_weights(once) == once


def test_domains_without_a_weight_do_not_count():
    found = relative_weights({"a": 0.5, "b": 0.25, "never": 0.0, "none": None})
    assert found["never"] == 0 and found["none"] is None
    assert found["a"] == pytest.approx(4 / 3)
    assert math.isnan(relative_weights({"a": math.nan, "b": 0.2})["a"])
    assert relative_weights(None) == relative_weights({}) == {}
    assert relative_weights({"a": 0.0}) == {"a": 0.0}


def test_a_domain_that_is_not_harmed_weighs_one():
    given = {"a": 1.0, "b": 0.4, "c": 1.0}
    assert relative_weights(given) == given
