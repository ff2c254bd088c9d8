"""RecBole's models by name, and why some of them cannot stand in a table beside the others. Imports Python alone.

    .venv-peers/bin/python trainer/study/peers/recbole_models.py

prints {"models": {name: null, or why not}}; {"models": null} where there is no RecBole. RecBole itself is not imported, which
takes seconds.
"""

import importlib.util
import json
import re
from pathlib import Path

# Folders of recbole/model.
_FAMILIES = {
    "sequential_recommender": None,
    "general_recommender": None,
    "context_aware_recommender": "it predicts clicks from features of users and items, of which the log has none",
    "knowledge_aware_recommender": "it needs a knowledge graph of the items",
    "exlib_recommender": "it grows trees over features of users and items, of which the log has none",
}
_FEATURES = "it needs features of the items, of which the log has none"
_STAGES = "it is trained in stages, each from the file of the one before"
_MODELS = {
    "FDSA": _FEATURES,
    "GRU4RecF": _FEATURES,
    "SASRecF": _FEATURES,
    "GRU4RecKG": "it needs vectors of a knowledge graph of the items",
    "KSR": "it needs vectors of a knowledge graph of the items",
    "S3Rec": "it is pretrained on attributes of the items, of which the log has none",
    "RaCT": _STAGES,
}


def models(package: Path):
    """{name: None, or one line that says why it cannot be used} of a RecBole package's folder."""
    found = {}
    for family, reason in _FAMILIES.items():
        for file in sorted((package / "model" / family).glob("*.py")):
            names = re.findall(
                r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE
            )
            for name in names:
                if name.lower() == file.stem:  # RecBole's own rule
                    found[name] = _MODELS.get(name, reason)
    return found


def main():
    spec = importlib.util.find_spec("recbole")
    found = models(Path(spec.origin).parent) if spec and spec.origin else None
    print(json.dumps({"models": found}))


if __name__ == "__main__":
    main()
