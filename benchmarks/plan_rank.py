"""A rank that trains as launch/train.py would, and writes down what it took: to hold against
`launch/train.py --plan` (docs/clusters.md).

    python benchmarks/plan_rank.py FILE key=value …
    deepspeed --num_gpus 2 benchmarks/plan_rank.py FILE key=value …

FILE gets the rank's number at its end. In it: {"steps": [{"clock", "processor", "interactions",
"resident", "peak"}, …], "validated": bytes resident at most until the last validation has ended,
"peak": until the run has}.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.config import load_config
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script
from trainer.planning import host_memory
from trainer.training.callbacks import Callback
from trainer.training.loop import train

if TYPE_CHECKING:
    from trainer.checkpoint.layout import RunState
    from trainer.training.callbacks import StepReport


class Meter(Callback):
    """Notes of each step the seconds of the clock and of this process's processor, and its tokens;
    and the most memory so far.
    """

    def __init__(self):
        self.steps = []
        self.validated = 0
        self._clock = None
        self._processor = 0.0

    def on_step(self, state: "RunState", report: "StepReport") -> None:
        """A step has ended; the time until the next one's end is the next one's."""
        clock = time.perf_counter()
        processor = time.process_time()
        if self._clock is not None:
            self.steps.append(
                {
                    "clock": clock - self._clock,
                    "processor": processor - self._processor,
                    "resident": host_memory.resident_bytes(),
                    "peak": host_memory.peak_bytes(),
                    "interactions": report.rank_batch.batch.interactions,
                }
            )
        self._clock = clock
        self._processor = processor

    def on_validation(self, state: "RunState", record: dict[str, Any]) -> None:
        """A validation has ended; it is in no step's time."""
        self._clock = None
        self.validated = host_memory.peak_bytes()


def main() -> None:
    """Trains, and writes what it took."""
    file, *settings = sys.argv[1:]
    config = load_config([], settings)
    meter = Meter()
    with process_group.join_process_group(5, "cpu") as ranks:
        train(config, ranks, callbacks=[meter])
        peak = host_memory.peak_bytes()
    record = {
        "steps": meter.steps,
        "validated": meter.validated,
        "peak": peak,
    }
    Path(f"{file}.{ranks.rank}").write_text(json.dumps(record))


if __name__ == "__main__":
    run_script(main)
