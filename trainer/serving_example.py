"""Recommends from this folder with PyTorch, NumPy and safetensors alone; a history's items stand oldest first, each with its
time as the logs have it (dates: microseconds since 1970). The request is now for the model: at the last time that it knows.

    python example.py DOMAIN K [TIME:DOMAIN:ITEM …]
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file


class Recommender:
    def __init__(self, folder):
        self.schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        self.encoder = torch.export.load(folder / "encoder.pt2").module()
        self.own_weight = {domain["name"]: domain["own_weight"] for domain in self.schema["domains"]}
        places = {domain["name"]: folder / domain["folder"] for domain in self.schema["domains"]}
        self.items = {name: np.load(place / "items.npy", mmap_mode="r") for name, place in places.items()}
        own = {name: place for name, place in places.items() if self.own_weight[name]}
        self.own = {name: torch.export.load(place / "encoder.pt2").module() for name, place in own.items()}
        self.ids = {name: self._texts(load_file(place / "ids.safetensors")) for name, place in places.items()}
        self.rows = {name: {text: row for row, text in enumerate(ids)} for name, ids in self.ids.items()}

    def _texts(self, stored):
        text, ends = stored["bytes"].tobytes(), stored["offsets"].tolist()
        return [text[begin:end].decode() for begin, end in pairwise(ends)]

    def user(self, known, domain, now):
        """What a domain's items are scored with for a history of (time, domain, row), oldest first: (r,)."""
        vector, weight = self._encoded(self.encoder, known, now), self.own_weight[domain]
        if weight:
            alone = self._encoded(self.own[domain], [event for event in known if event[1] == domain], now)
            vector = (1 - weight) * vector + weight * alone
        return vector

    def _encoded(self, encoder, known, now):
        recent = known[-self.schema["max_length"] :]
        vectors = np.zeros((1, max(1, len(recent)), self.schema["width"]), np.float32)
        times = torch.zeros(vectors.shape[:2], dtype=torch.float64)
        for place, (time, domain, row) in enumerate(recent):
            vectors[0, place], times[0, place] = self.items[domain][row], time
        return encoder(torch.from_numpy(vectors), torch.tensor([len(recent)]), times, torch.tensor([now]).double())[0]

    def __call__(self, history, domain, k, now=None):
        """The k best items of a domain that are not in the history of (time, domain, item), as (id, score); fewer where there
        are fewer. Items and domains of the history that the model does not know are left out of it; one without any is a new
        user's. now: for when is asked; the last time that the model knows, unless said."""
        now = self.schema["last_time"] if now is None else now
        known = [(time, name, self.rows[name][item]) for time, name, item in history if item in self.rows.get(name, {})]
        scores = torch.from_numpy(np.asarray(self.items[domain], np.float32)) @ self.user(known, domain, now)
        scores[[row for _, name, row in known if name == domain]] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.ids[domain][row], score) for row, score in found if score > -torch.inf]


if __name__ == "__main__":
    wanted, count, *events = sys.argv[1:]
    recommender = Recommender(Path(__file__).parent)
    if wanted not in recommender.items:
        sys.exit(f"there is no domain {wanted!r}: it is one of {', '.join(recommender.items)}")
    history = [(float(time), name, item) for time, name, item in (event.split(":", 2) for event in events)]
    for item, score in recommender(history, wanted, int(count)):
        print(f"{item}\t{score:.6f}")
