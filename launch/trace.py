"""Draws what all ranks did in some steps, and who waited for whom: one page.

    python launch/trace.py --run runs/1                    the last steps
    python launch/trace.py --run runs/1 --steps 100-104    these

The run was trained with profile.phases=true, which has each rank write a line a step. It may still
train. The page is RUN/trace.html.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.command_line import option, parse_options
from trainer.config.run import read_window
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    run: str = option("the folder of a run", metavar="DIR")
    steps: str | None = option(
        "the steps to draw, 100-104; without it: the last ones",
        None,
        metavar="FIRST-LAST",
    )
    output: str | None = option(
        "another file than RUN/trace.html", None, metavar="FILE"
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Draws the page, and says where it is."""
    options = parse()
    window = None
    if options.steps is not None:
        window = read_window(options.steps)
        if window is None:
            raise InputError(
                f"--steps is {options.steps}: give a step, or the first and the last one: 100-104"
            )
    output = None if options.output is None else Path(options.output)
    # Plotly is for the page alone.
    from trainer.reporting.trace.page import write_trace

    print(f"trace: {write_trace(Path(options.run), window, output)}")


if __name__ == "__main__":
    run_script(main)
