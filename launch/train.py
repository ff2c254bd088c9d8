"""Trains SyNCRec on a prepared dataset.

    python launch/train.py --config default data=DIR run=DIR                  one process
    deepspeed --num_gpus 2 launch/train.py --config … data=DIR run=DIR        two ranks here
    deepspeed --hostfile HOSTS launch/train.py --config … data=DIR run=DIR    a cluster
    python launch/train.py --show-config --config amazon4                     what a preset says
    python launch/train.py --plan --config … data=DIR                         what it will take

Presets: default (what holds without --config), amazon4, demo, paper, sasrec, gru4rec; and timeline,
over another one (--config default --config timeline), for a split by time.

The same command again resumes from the newest whole checkpoint in the run's folder, with any number
of ranks. Exit status: 0 finished; 2 something given cannot be used; 3 the loss is not finite;
4 other ranks are gone; 5 the storage is late; 75 stopped by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP
with a checkpoint written; 130 interrupted outside of training; else: a fault of the program or of
the machine.

Any setting is `key=value`: global_batch_size=4096 model.dim=64 deepspeed.zero_optimization.stage=2
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.stack import check_stack
from trainer.config import RunConfig, load_config, to_yaml
from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import (
    Device,
    ItemTitles,
    Verbosity,
)
from trainer.distributed.process_exit import run_script
from trainer.distributed.supervisor import supervise
from trainer.errors import exit_on_input_error
from trainer.run_files import NCCL


@dataclass(frozen=True, kw_only=True)
class Options(Device, ItemTitles, Verbosity):
    """The command line."""

    config: list[str] = option(
        "a preset or YAML; given again: over the one before",
        list,
        repeat=True,
        metavar="NAME|FILE",
    )
    deepspeed_config: str | None = option(
        "DeepSpeed's own JSON, as under `deepspeed:` in the YAML",
        None,
        flags=("--deepspeed_config",),
        metavar="FILE",
    )
    show_config: bool = option(
        "print the effective configuration and stop", False
    )
    plan: bool = option(
        "print the memory, network and time that the run will take, and stop; no rank is started",
        False,
    )
    ranks: int | None = option(
        "of --plan: how many ranks; without it: as many as are started",
        None,
        metavar="N",
    )
    hosts: int | None = option(
        "of --plan: on how many hosts; without it: eight GPUs on each",
        None,
        metavar="N",
    )
    gpu: str | None = option(
        "of --plan: A100, H100 or H200; without it: this machine's processor",
        None,
        metavar="NAME",
    )
    between_gbit: float = option(
        "of --plan: what a host sends to others, in Gbit/s",
        400.0,
        metavar="NUMBER",
    )
    fresh: bool = option(
        "refuse a folder that holds a run, in place of resuming", False
    )
    accept_changes: bool = option(
        "resume though the dataset or a setting has changed since the checkpoint",
        False,
    )
    max_restarts: int = option(
        "restarts from the last checkpoint after a fault", 0, metavar="N"
    )
    settings: list[str] = option(
        "settings, listed below", list, settings_of=RunConfig
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line; what the DeepSpeed launcher appends is taken and ignored."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Reads the configuration, joins the ranks, trains."""
    options = parse()
    check_stack(options.device)
    config = load_config(
        options.config,
        [*options.verbosity_settings(), *options.settings],
        options.deepspeed_config,
    )
    if options.show_config:
        print(to_yaml(config), end="")
        return
    if options.plan:
        from trainer.planning.command import plan_run

        plan_run(
            config,
            options.ranks,
            options.hosts,
            options.gpu,
            options.between_gbit,
        )
        return
    if options.max_restarts > 0:
        supervise(options.max_restarts)
    from trainer.distributed import process_group
    from trainer.training.loop import train

    with process_group.join_process_group(
        config.timeout_minutes, options.device, Path(config.run) / NCCL
    ) as ranks:
        train(
            config,
            ranks,
            options.fresh,
            options.accept_changes,
            titles=options.titles,
        )


if __name__ == "__main__":
    run_script(main, goes_on=True)
