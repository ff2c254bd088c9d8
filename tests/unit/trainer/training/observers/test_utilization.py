"""Which share of the device's arithmetic a run uses."""

import pytest
import torch

from trainer.config.run import MEASURED_PEAK, ProfileConfig
from trainer.training.observers.utilization import find_peak, measure_peak

CPU = torch.device("cpu")


def test_a_peak_is_named_measured_or_not_asked_for(monkeypatch):
    assert find_peak(0.0, CPU, "fp32") == 0
    assert find_peak(989.0, CPU, "fp32") == 989e12
    monkeypatch.setattr("trainer.training.observers.utilization._SECONDS", 0.01)
    measured = find_peak(MEASURED_PEAK, CPU, "fp32")
    assert 1e8 < measured < 1e14
    assert measure_peak(CPU, "bf16") > 1e7


@pytest.mark.parametrize("peak", [-2.0, -0.5, float("inf"), float("nan")])
def test_other_peaks_are_refused(peak):
    with pytest.raises(ValueError, match=r"profile\.peak_tflops is"):
        ProfileConfig(peak_tflops=peak)
