"""Trains SyNCRec on a prepared dataset.

    python launch/train.py --config launch/configs/default.yaml data=DIR run=DIR               one process
    deepspeed --num_gpus 2 launch/train.py --config … data=DIR run=DIR                         two ranks on this host
    deepspeed --hostfile HOSTS launch/train.py --config … data=DIR run=DIR                     a cluster

The same command again goes on from the newest whole checkpoint in the run's folder, with any number of ranks.
Exit status: 0 finished; 2 something given cannot be used; 3 the loss is not finite; 4 other ranks are gone; 75 stopped by
SIGTERM or SIGUSR1 with a checkpoint written; anything else: a fault of the program or of the machine.

Any setting is `key=value` (`global_batch_size=4096 model.dim=64 deepspeed.zero_optimization.stage=2`).
"""

import argparse

from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.distributed.supervisor import supervise
from trainer.errors import exit_on_input_error


def parse(arguments=None):
    """--config, --deepspeed_config and key=value; what the DeepSpeed launcher appends is taken and ignored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="YAML file; given again: over the one before",
    )
    parser.add_argument(
        "--deepspeed_config",
        help="DeepSpeed's own JSON, as under `deepspeed:` in the YAML",
    )
    parser.add_argument(
        "--show-config",
        action="store_true",
        help="print the effective configuration and stop",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="refuse a folder that holds a run, in place of going on",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on though the dataset or a setting has changed since the checkpoint",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a fault, begin again from the last checkpoint, N times",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


@exit_on_input_error
def main():
    """Reads the configuration, joins the ranks, trains."""
    check_stack()
    options = parse()
    if options.max_restarts > 0:
        supervise(options.max_restarts)
    from trainer.config.load import load_config, to_yaml
    from trainer.distributed import process_group
    from trainer.training.loop import train

    config = load_config(options.config, options.settings, options.deepspeed_config)
    if options.show_config:
        print(to_yaml(config), end="")
        return
    with process_group.joined(config.timeout_minutes) as ranks:
        train(config, ranks, options.fresh, options.accept_changes)


if __name__ == "__main__":
    run_script(main)
