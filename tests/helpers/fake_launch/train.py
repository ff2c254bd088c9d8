"""Stands for launch/train.py: leaves the records that a study reads, fails where the seed is 66, waits where it is 77."""

import json
import signal
import sys
import time
from pathlib import Path

given = dict(
    word.split("=", 1) for word in sys.argv[1:] if not word.startswith("--")
)
run = Path(given["run"])
run.mkdir(parents=True, exist_ok=True)
with (run.parents[1] / "calls.txt").open("a") as calls:
    calls.write(f"train {run.parent.name}\n")
if given["seed"] == "66":
    sys.exit("error: the seed is 66")
if given["seed"] == "77":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
value = (
    0.1 * len(given["stream.domain"])
    if "stream.domain" in given
    else float(given.get("model.dropout", 0.3))
)
records = [
    {"kind": "train", "step": 1, "seconds": 2.0, "users_per_second": 50.0},
    {
        "kind": "validation",
        "step": 1,
        "seconds": 3.0,
        "mean": {"NDCG@10": value},
        "domains": {},
    },
    {
        "kind": "validation",
        "step": 2,
        "seconds": 4.0,
        "mean": {"NDCG@10": value - 0.1},
        "domains": {},
    },
]
(run / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
)
(run / "given.json").write_text(json.dumps(given))
(run / "checkpoints").mkdir(exist_ok=True)
