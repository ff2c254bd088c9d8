"""Stands before RecBole's Python: called as `every_pair.py SCRIPT ARGUMENTS…`, it runs the script, and leaves at $SCORES what
the model gives each pair of a user and an item by itself: float32 (users, rows of M), NaN where no item is.
"""

import os
import runpy
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def main():
    script, sys.argv = sys.argv[1], sys.argv[1:]
    if Path(script).name != "recbole_peer.py":
        runpy.run_path(script, run_name="__main__")
        return
    sys.path.append(str(ROOT))
    import trainer.study.peers.recbole_peer as peer

    ranks = peer.Scores.test

    def scored(self):
        np.save(
            os.environ["SCORES"],
            every_pair(
                self.config, self.dataset, self.model.eval(), self.handed
            ),
        )
        return ranks(self)

    peer.Scores.test = scored
    peer.main()


def every_pair(config, dataset, model, handed):
    """By `predict`, with the history before the test item."""
    import torch
    from recbole.data.interaction import Interaction

    users, items = (
        dataset.field2token_id["user_id"],
        dataset.field2token_id["item_id"],
    )
    rows = [int(token) for token in items if token != "[PAD]"]
    scores_UI = np.full((len(handed.user_U), max(rows) + 1), np.nan, np.float32)
    numbers = torch.tensor([items[str(row)] for row in rows])
    longest = config["MAX_ITEM_LIST_LENGTH"] or 1
    for user, (start, length) in enumerate(
        zip(handed.starts_U, handed.lengths_U, strict=True)
    ):
        seen = [
            items[str(row)]
            for row in handed.items_N[start : start + length - 1]
        ][-longest:]
        fields = {
            "user_id": torch.full((len(rows),), users[str(user)]),
            "item_id": numbers,
            "item_id_list": torch.tensor(
                [seen + [0] * (longest - len(seen))] * len(rows)
            ),
            "item_length": torch.full((len(rows),), len(seen)),
        }
        with torch.no_grad():
            scores_UI[user, rows] = (
                model.predict(Interaction(fields)).view(-1).numpy()
            )
    return scores_UI


if __name__ == "__main__":
    main()
