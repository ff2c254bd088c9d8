"""A metric of one's own, in every validation: how far the domains lie apart.

    python examples/custom_metric.py DATA RUN

A callback sees every step, validation and checkpoint of a run, on all ranks.
"""

import sys
from typing import Any

from trainer import Callback, fit


class LossSpread(Callback):
    """Keeps how far the domains' losses lie apart, and prints it at every validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, state: Any, report: Any) -> None:
        """Called after every step. The report's tensors lie on the device: reading one waits for it."""
        self.losses.append(float(report.loss))

    def on_validation(self, state: Any, record: dict[str, Any]) -> None:
        """Called after every validation, with its record."""
        by_domain = record["domains"]
        figures = [metrics["NDCG@10"] for metrics in by_domain.values()]
        spread = max(figures) - min(figures)
        print(
            f"step {state.step}: NDCG@10 of the domains lies {spread:.4f} apart"
        )


def main(data: str, run: str) -> None:
    """Trains with the callback."""
    spread = LossSpread()
    fit(data, run, callbacks=[spread], epochs=2, global_batch_size=128)
    print(
        f"{len(spread.losses)} steps, the last loss is {spread.losses[-1]:.4f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
