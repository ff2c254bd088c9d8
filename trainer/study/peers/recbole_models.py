"""Lists RecBole's models by name, and why some of them cannot be baselines. Imports Python alone.

    .venv-peers/bin/python trainer/study/peers/recbole_models.py

prints {"models": {name: null, or why not}}; {"models": null} where there is no RecBole. RecBole
itself is not imported, which takes seconds.
"""

import importlib.util
import json
import re
from pathlib import Path

# Folders of recbole/model.
_FAMILIES: dict[str, str | None] = {
    "sequential_recommender": None,
    "general_recommender": None,
    "context_aware_recommender": "it predicts clicks from features of users and items, of "
    "which the log has none",
    "knowledge_aware_recommender": "it needs a knowledge graph of the items",
    "exlib_recommender": "it grows trees over features of users and items, of which the "
    "log has none",
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


def list_models(package: Path) -> dict[str, str | None]:
    """{name: None, or one line that says why it cannot be used} of a RecBole package's folder."""
    models: dict[str, str | None] = {}
    for family, reason in _FAMILIES.items():
        for file in sorted((package / "model" / family).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            for name in re.findall(
                r"^class (\w+)\(",
                text,
                re.MULTILINE,
            ):
                if name.lower() == file.stem:  # RecBole's own rule
                    models[name] = _MODELS.get(name, reason)
    return models


def main() -> None:
    """Prints the models of the RecBole that this Python has."""
    models = None
    spec = importlib.util.find_spec("recbole")
    if spec and spec.origin:
        models = list_models(Path(spec.origin).parent)
    print(json.dumps({"models": models}))


if __name__ == "__main__":
    main()
