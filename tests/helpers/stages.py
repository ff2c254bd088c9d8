"""Started with real ranks: one run through the trainer's own loop for each ZeRO stage.

python stages.py DATA OUTPUT STAGE [STAGE …] key=value …

2x4 is stage 2 with accumulation over 4 micro-batches.
"""

import argparse
import sys

from tests.helpers import PARTS
from trainer.config.load import load_config
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script
from trainer.training.loop import train

# Small, and with everything on that reduces over ranks: λ, SC-MIM with global negatives, clipping, a schedule.
SETTINGS = [
    *PARTS,
    "max_steps=50",
    "epochs=50",
    "global_batch_size=30",
    "log.every=1",
    "log.tensorboard=false",
    "stream.workers=0",
    "model.dim=16",
    "model.ffn_dim=16",
    "model.max_length=12",
    "model.experts=3",
    "model.cross_experts=2",
    "model.dropout=0",
    "negatives.shared=40",
    "optimizer.clip=0.5",
    "optimizer.warmup_steps=5",
    "optimizer.schedule=cosine",
]


def main():
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_intermixed_args(sys.argv[1:])
    settings = [word for word in options.rest if "=" in word]
    with process_group.join_process_group(timeout_minutes=2) as ranks:
        for word in (word for word in options.rest if "=" not in word):
            stage, _, accumulation = word.partition("x")
            own = [
                f"data={options.data}",
                f"run={options.output}/{word}",
                f"optimizer.zero_stage={stage}",
                f"accumulation={accumulation or 1}",
            ]
            train(load_config([], SETTINGS + own + settings), ranks)


if __name__ == "__main__":
    run_script(main)
