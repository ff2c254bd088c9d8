"""Stands before RecTools' Python: called as `every_rectools_score.py SCRIPT ARGUMENTS…`, it runs the script, and leaves at $SCORES
what RecTools' own `recommend` gives each pair of a user and an item: float32 (users, rows of M), −inf where it recommends nothing.
"""

import os
import runpy
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def main():
    script, sys.argv = sys.argv[1], sys.argv[1:]
    if Path(script).name != "rectools_peer.py":
        runpy.run_path(script, run_name="__main__")
        return
    sys.path.append(str(ROOT))
    import trainer.study.peers.rectools_peer as peer

    models = []
    make_model = peer.make_model
    ranks = peer.Scores.test

    def made(*given):
        models.append(make_model(*given))
        return models[-1]

    def scored(self):
        np.save(os.environ["SCORES"], every_score(models[0], self.handed))
        return ranks(self)

    peer.make_model = made
    peer.Scores.test = scored
    peer.main()


def every_score(model, handed):
    """By `recommend`, with the history before each test target."""
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    rows = []
    user_T, back_T = handed.targets("test")
    for user, back in zip(user_T, back_T, strict=True):
        start, length = handed.starts_U[user], handed.lengths_U[user]
        for place, item in enumerate(
            handed.items_N[start : start + length - back]
        ):
            rows.append(
                (
                    int(user),
                    int(item),
                    1.0,
                    pd.Timestamp(2001, 1, 1) + pd.Timedelta(place, "D"),
                )
            )
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    dataset = Dataset.construct(pd.DataFrame(rows, columns=names))
    recommended = model.recommend(
        users=user_T,
        dataset=dataset,
        k=int(handed.items_N.max()) + 1,
        filter_viewed=False,
        on_unsupported_targets="ignore",
    )
    scores_UI = np.full(
        (len(handed.user_U), int(handed.domains_D2[-1].sum())),
        -np.inf,
        np.float32,
    )
    scores_UI[recommended[Columns.User], recommended[Columns.Item]] = (
        recommended[Columns.Score]
    )
    return scores_UI


if __name__ == "__main__":
    main()
