"""Stands for launch/evaluate.py: ranks of ten users of two domains, or of those of the one domain."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

run = Path(sys.argv[sys.argv.index("--run") + 1])
with (run.parents[1] / "calls.txt").open("a") as calls:
    calls.write(f"evaluate {run.parent.name}\n")
given = json.loads((run / "given.json").read_text())
domain = given.get("stream.domain")
users = [user for user in range(10) if domain in (None, f"domain {user % 2}")]
worse = 1 if given.get("model.loss_correction") == "none" and not domain else 0
columns = {
    "user": pa.array(users, pa.int64()),
    "domain": pa.array([user % 2 for user in users], pa.int32()),
    "sampled": pa.array([1 + user % 3 + worse for user in users], pa.int32()),
    "full": pa.array([1 + user + worse for user in users], pa.int32()),
}
pq.write_table(pa.table(columns), run / "ranks-test.parquet")
metrics = {"NDCG@10": 0.1, "HR@10": 0.2, "MRR": 0.05}
popularity = {
    "popularity": {f"domain {d}": metrics for d in range(2)},
    "popularity_mean": metrics,
    "recency": {f"domain {d}": metrics | {"NDCG@10": 0.15} for d in range(2)},
    "recency_mean": metrics | {"NDCG@10": 0.15},
}
(run / "evaluation-full-test.json").write_text(
    json.dumps(popularity | {"sampled": popularity})
)
