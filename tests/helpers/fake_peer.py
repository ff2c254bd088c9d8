"""Stands for the other environment's Python: called as `fake_peer.py SCRIPT ARGUMENTS…`, it answers as RecBole's side would.

Environment: FAKE_PEER names what it does, as below; CALLS a file that gets a line for each training.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

WHAT = os.environ.get("FAKE_PEER", "trains")
MODELS = {
    "BPR": None,
    "STAMP": None,
    "SASRec": None,
    "S3Rec": "it is pretrained",
}


def main():
    script = Path(sys.argv[1]).name
    if script == "recbole_models.py":
        print(json.dumps({"models": None if WHAT == "no recbole" else MODELS}))
        return
    given, task, ranks = map(Path, sys.argv[2:])
    with open(os.environ["CALLS"], "a") as calls:
        print(task.read_text().replace("\n", ""), file=calls)
    print("a warning", file=sys.stderr)
    if WHAT == "fails":
        print("ValueError: Training loss is nan", file=sys.stderr)
        sys.exit(1)
    if WHAT == "refuses":
        print(
            json.dumps(
                {"error": "RecBole has no option learning_rat: learning_rate?"}
            ),
            flush=True,
        )
        return
    same = {"training_seconds": 50.0, "validation": 0.25}
    epochs = [
        {"epoch": epoch, "seconds": 60.0 * (epoch + 1)} | same
        for epoch in range(2)
    ]
    for epoch in epochs:
        print(json.dumps(epoch | {"of": 4, "best": epochs[0]}), flush=True)
    if WHAT == "dies":
        os.kill(os.getpid(), 9)
    if WHAT == "hangs":
        (ranks.parent / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    users = np.load(given / "users.npy")
    np.savez(
        ranks,
        sampled=np.arange(len(users), dtype=np.int32) + 1,
        full=np.arange(len(users), dtype=np.int32) + 7,
    )
    found = {
        "epochs": epochs,
        "best_epoch": 0,
        "validation": 0.25,
        "validation_again": 0.25,
        "stopped": "patience",
    }
    print(
        json.dumps(
            {
                "found": found
                | {"seconds": 120.0, "users_per_second": 5.0, "versions": {}}
            }
        )
    )


main()
