"""What time adds, beyond what the padded reference of tests/unit/syncrec/test_model.py holds."""

import pytest
import torch

from syncrec.config import ModelConfig
from syncrec.layers.time_encoding import TICKS, Clock


def clock(knots):
    made = Clock(ModelConfig(dim=3, time_knots=knots))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def encoded(made, ticks):
    time_N = torch.tensor(ticks)
    gap_N = torch.zeros_like(time_N)
    return torch.cat(
        [made.encode_tokens(time_N, gap_N), made.encode_outputs(time_N)], 1
    ).detach()


@pytest.mark.parametrize("knots", [1, 2, 5])
@pytest.mark.parametrize("newest", [0, 1, 30_000, TICKS])
def test_the_newest_time_of_training_stands_for_all_later_ones(knots, newest):
    made = clock(knots)
    before = encoded(made, [0, newest // 2, newest])
    made.end_training(newest)
    assert torch.equal(encoded(made, [0, newest // 2, newest]), before)
    later = encoded(made, [min(TICKS, newest + 1), TICKS])
    assert torch.equal(later, before[2:].expand(2, -1))
    made.end_training(None)
    assert torch.equal(encoded(made, [TICKS]), encoded(clock_of(made), [TICKS]))


def clock_of(other):
    """A clock with the state of one that was saved before it knew where training ends."""
    state = other.state_dict()
    del state["newest_tick"]
    made = clock(other.knots_2KR.shape[1])
    made.end_training(7)
    made.load_state_dict(state)
    return made


def test_one_knot_is_the_same_at_all_times():
    rows = encoded(clock(1), [0, 3, 40_000, TICKS])
    assert torch.equal(rows, rows[:1].expand(4, -1))
