"""Trains SyNCRec on a prepared dataset.

    python launch/train.py --config launch/configs/default.yaml data=DIR run=DIR               one process
    deepspeed --num_gpus 2 launch/train.py --config … data=DIR run=DIR                         two ranks on this host
    deepspeed --hostfile HOSTS launch/train.py --config … data=DIR run=DIR                     a cluster

Any setting is `key=value` (`global_batch_size=4096 model.dim=64 deepspeed.zero_optimization.stage=2`).
"""

import argparse

from launch.stack import check_stack
from trainer.errors import exit_on_input_error
from trainer.process import run_script


def parse(arguments=None):
    """--config, --deepspeed_config and key=value; what the DeepSpeed launcher appends is taken and ignored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="YAML file; given again: over the one before")
    parser.add_argument("--deepspeed_config", help="DeepSpeed's own JSON, as under `deepspeed:` in the YAML")
    parser.add_argument("--show-config", action="store_true", help="print the effective configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


@exit_on_input_error
def main():
    """Reads the configuration, joins the ranks, trains."""
    check_stack()
    options = parse()
    from trainer import distributed
    from trainer.config import load_config, to_yaml
    from trainer.loop import train

    config = load_config(options.config, options.settings, options.deepspeed_config)
    if options.show_config:
        print(to_yaml(config), end="")
        return
    with distributed.joined(config.timeout_minutes) as ranks:
        train(config, ranks)


if __name__ == "__main__":
    run_script(main)
