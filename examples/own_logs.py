"""From logs on disk to recommendations, in one script.

    python examples/own_logs.py LOGS OUTPUT

LOGS is a folder of Parquet, CSV or TSV with the columns user_id, item_id, domain and timestamp. Name
others as below. OUTPUT gets the dataset, the run and the recommendations.
"""

import sys
from pathlib import Path

from trainer import fit, prepare

SETTINGS = {
    "epochs": 3,
    "global_batch_size": 128,
    "model": {"dim": 32, "ffn_dim": 32, "max_length": 32},
    "log": {"every": 20, "tensorboard": False},
}


def main(logs: str, output: str) -> None:
    """Prepares, trains, evaluates, recommends."""
    folder = Path(output)
    # Columns with other names: user_column="uid", time_column="ts", …
    data = prepare(logs, folder / "data", min_user=3)
    run = fit(data, folder / "run", **SETTINGS)

    evaluation = run.evaluate()
    print(evaluation.by_domain.to_pandas().to_string(index=False))

    best = run.recommend(k=5, output=folder / "recommendations")
    print(f"{best.num_rows:,} recommendations in {folder / 'recommendations'}")
    print(f"The report: {run.report}")


if __name__ == "__main__":
    main(*sys.argv[1:])
