"""Started by a launcher: prints the world that trainer.distributed.launchers reads, as it is put into the environment."""

import json
import os

from trainer.distributed.launchers import enter_world, read_world

if __name__ == "__main__":
    enter_world(read_world())
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    print(
        json.dumps({name: os.environ.get(name) for name in names}) + "\n",
        end="",
        flush=True,
    )
