"""What tests share: programs that they start, data that they make, and the processes of ranks."""

from pathlib import Path

HELPERS = Path(__file__).parent
# The paper's three parts, which a run has for the asking.
PARTS = [
    "model.stop_gradient=on",
    "model.loss_correction=negative_transfer_gap",
    "model.mutual_information=on",
]
