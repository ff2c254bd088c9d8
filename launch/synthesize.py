"""Makes a synthetic log with a known truth: related domains help one another, one is unrelated.

    python launch/synthesize.py --output logs --users 2000 --domains 4 --mean-length 40 --seed 0
    python launch/synthesize.py --output logs --users 12000000 --items 1000000 --domains 9
    … --first-user 3000000 --last-user 6000000      the same rows, of these users alone

It writes Parquet files for launch/prepare.py, and _truth.json: which domains are related.
"""

from trainer.interrupts import begin_work, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.config.command_line import option, parse_options
from trainer.config.prepare import SyntheticConfig
from trainer.data.synthetic import synthesize_logs
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    output: str = option(
        "a folder that does not exist yet or is empty", metavar="DIR"
    )
    log: SyntheticConfig = option(
        "how much, and how it behaves", SyntheticConfig
    )
    first_user: int = option("write the users [A, B) alone", 0, metavar="A")
    last_user: int | None = option(
        "the end of these users; without it: all", None, metavar="B"
    )
    processes: int | None = option(
        "how many write; without it: one for every core", None, metavar="N"
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Writes the log."""
    options = parse()
    begin_work()
    count = synthesize_logs(
        config=options.log,
        output=options.output,
        first_user=options.first_user,
        last_user=options.last_user,
        processes=options.processes,
    )
    last_user = options.last_user
    if last_user is None:
        last_user = options.log.users
    users = last_user - options.first_user
    print(
        f"{options.output}: {count:,} interactions of {users:,} users in "
        f"{options.log.domains} domains"
    )


if __name__ == "__main__":
    run_script(main)
