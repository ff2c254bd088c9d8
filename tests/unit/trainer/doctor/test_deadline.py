"""What hangs is left behind."""

import threading

import pytest

from trainer.doctor.deadline import Unanswered, call_with_deadline


def test_what_hangs_is_left_behind_and_what_fails_fails():
    end = threading.Event()
    with pytest.raises(Unanswered, match=r"no answer within 0\.05 s"):
        call_with_deadline(end.wait, 0.05)
    end.set()
    assert call_with_deadline(end.wait, 5.0) is True
    with pytest.raises(ZeroDivisionError):
        call_with_deadline(lambda: 1 // 0, 5.0)
