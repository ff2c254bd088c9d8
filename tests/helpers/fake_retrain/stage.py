"""What the four stand-ins do: they note how they were called, die where the file `die-STAGE` lies beside the folder, are asked to
stop where `stop-STAGE` does, and leave what a retraining reads; a day whose own log has "bad" in its name is refused."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def _called(stage, day):
    root = day.parents[1]
    with (root / "calls.txt").open("a") as calls:
        calls.write(f"{day.name} {stage} {' '.join(sys.argv[1:])}\n")
    if (root / f"die-{stage}").exists():
        (root / f"die-{stage}").unlink()
        os._exit(9)
    if (root / f"stop-{stage}").exists():
        # Ctrl-C reaches the retraining, which asks this stage to end.
        (root / f"stop-{stage}").unlink()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


def _after(word):
    return sys.argv[sys.argv.index(word) + 1]


def _words_after(word):
    words = []
    for other in sys.argv[sys.argv.index(word) + 1 :]:
        if other.startswith("--"):
            break
        words.append(other)
    return words


def prepare():
    """A dataset with an extension where it extends one."""
    output = Path(_after("--output"))
    _called("prepare", output.parent)
    output.mkdir()
    logs = _words_after("--input")
    if "--extend" in sys.argv:
        extended = Path(_after("--extend"))
        logs = [*(extended / "input.txt").read_text().split(), *logs]
    (output / "input.txt").write_text(" ".join(logs))
    (output / "newest.txt").write_text(_words_after("--input")[-1])
    if "--extend" in sys.argv:
        own = {
            "items": 3,
            "items_before": 2,
            "new": 1,
            "retired": 0,
            "interactions": 9,
            "interactions_before": 5,
        }
        facts = {
            "arrived": 4,
            "delivered_before": 1,
            "late": 2,
            "before_window": 0,
            "laid_out_anew": True,
        }
        facts |= {"users": {"before": 2, "now": 3}, "domains": {"shop": own}}
        (output / "extension").mkdir()
        (output / "extension" / "extension.json").write_text(json.dumps(facts))


def evaluate():
    """A prequential evaluation's record; nothing is new where a day's own log has "old" in its name."""
    output = Path(_after("--record"))
    _called("evaluate", output.parent)
    if "old" in (output.parent / "dataset" / "newest.txt").read_text():
        output.write_text(json.dumps({"skipped": "no event is later"}))
        return
    figures = {"users": 9, "NDCG@10": 0.3}
    record = {"kind": "arrivals", "step": 3, "domains": {"shop": figures}}
    record |= {"mean": {"NDCG@10": 0.3}, "recency_mean": {"NDCG@10": 0.4}}
    record["recency"] = {"shop": {"users": 9, "NDCG@10": 0.4}}
    record["against_recency"] = {
        "shop": {
            "system": "model",
            "users": 5,
            "now": 0.3,
            "before": 0.4,
            "error": 0.01,
        }
    }
    output.write_text(json.dumps(record))


def train():
    """A run, tested at its end."""
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    run = Path(given["run"])
    run.mkdir(exist_ok=True)
    _called("train", run.parent)
    (run / "begun-with.txt").write_text(given.get("warm_start", ""))
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "test", "step": 3}) + "\n"
    )


def publish():
    """A version, or a refusal."""
    run, published = Path(_after("--candidate")), Path(_after("--to"))
    (published / "versions").mkdir(parents=True, exist_ok=True)
    _called("publish", run.parent)
    figures = {
        "users": 3,
        "newest": True,
        "candidate": 0.5,
        "current": 0.4,
        "when_published": None,
    }
    figures["difference"] = {"value": 0.1, "interval": [0.05, 0.15]}
    record = {"run": str(run), "domains": {"shop": figures}, "reasons": []}
    arrivals = json.loads(Path(_after("--arrivals")).read_text())
    record["arrivals"] = arrivals
    if "skipped" not in arrivals:
        record["warnings"] = ["shop: below recency popularity"]
        record["below_recency"] = ["shop"]
    if "bad" in (run.parent / "dataset" / "newest.txt").read_text():
        record["reasons"] = ["shop: worse"]
        (published / "refused.json").write_text(json.dumps(record))
        sys.exit(3)
    versions = sorted((published / "versions").iterdir())
    current = versions and json.loads(
        (versions[-1] / "version.json").read_text()
    )
    number = f"{len(versions) + 1:04d}"
    if current and current["run"] == str(run):
        return
    (published / "versions" / number / "model").mkdir(parents=True)
    (published / "versions" / number / "model" / "schema.json").write_text(
        json.dumps({"domains": []})
    )
    (published / "versions" / number / "version.json").write_text(
        json.dumps(record | {"number": number})
    )
    (published / "current.json").write_text(
        json.dumps({"version": number, "model": f"versions/{number}/model"})
    )
