"""The phases of a training step: on what a rank spends its time.

    between      between two steps: the log, validation, checkpoints, what callbacks do
    data         waits for the loader's next batch
    copy         copies the batch to the device, and starts to tell the ranks which rows are wanted
    ids          waits until the ranks know which rows are wanted of them
    rows         rows come from the ranks that hold them
    forward      forward of the dense model
    backward     backward of the dense model
    gradients    the dense gradient is summed over ranks (DeepSpeed)
    sums         sums over ranks that a step needs: for λ, for norms, signals
    table        the rows' gradients go to the ranks that hold them, which update the table
    optimizer    the dense optimizer

The host's clock tells them. On a CPU that is what was computed; on CUDA, where the host runs ahead of
the device, a phase is the time in which its work was queued, or the host waited for the device.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

BETWEEN = "between"
DATA = "data"
COPY = "copy"
IDS = "ids"
ROWS = "rows"
FORWARD = "forward"
BACKWARD = "backward"
GRADIENTS = "gradients"
SUMS = "sums"
TABLE = "table"
OPTIMIZER = "optimizer"
PHASES = (
    BETWEEN,
    DATA,
    COPY,
    IDS,
    ROWS,
    FORWARD,
    BACKWARD,
    GRADIENTS,
    SUMS,
    TABLE,
    OPTIMIZER,
)
# Those that are an exchange with other ranks, waiting for them included.
EXCHANGES = (IDS, ROWS, GRADIENTS, SUMS, TABLE)

# Called with the phase that begins and when, by time.perf_counter().
PhaseListener = Callable[[str, float], None]


class PhaseClock:
    """Times the phases of this rank's steps. A phase lasts until the next one begins.

    seconds: in each phase, since this clock was made. listeners: are told of each phase.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.listeners: list[PhaseListener] = []
        self.phase = BETWEEN
        self._begun = time.perf_counter()

    def begin(self, phase: str) -> None:
        """Ends the phase that there is, and begins another one."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._begun
        self.phase = phase
        self._begun = now
        for listener in self.listeners:
            listener(phase, now)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Within it this phase; after it the one of before again."""
        before = self.phase
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def exchange_seconds(self) -> float:
        """The seconds of all exchanges with other ranks so far."""
        return sum(self.seconds[phase] for phase in EXCHANGES)
