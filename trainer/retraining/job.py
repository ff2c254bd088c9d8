"""Every day again: new logs onto the dataset, training that begins with the model that serves, and publishing, as one job.

    FOLDER/days/NAME/plan.json      what this retraining began from: fixed when it first began
    FOLDER/days/NAME/dataset        the dataset with the new logs
    FOLDER/days/NAME/run            the run
    FOLDER/days/NAME/retrain.json   how it ended; report.md says it in words
    FOLDER/published                what serves (trainer/retraining/publish.py)

Each stage leaves something that the next call finds: killed anywhere, the same command goes on
there. A day that is refused stays out of what follows, and so does one that was rolled back: the
next one extends the dataset of the version that serves, and their logs may be given again. What a
stage has done is read from what it left: a launcher's status may say anything."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file

from trainer.config.retraining import RetrainConfig
from trainer.data.prepare.extend import EXTENSION
from trainer.errors import InputError
from trainer.files.atomic import write_json, write_text
from trainer.files.staged import exclusive
from trainer.reporting.run_log import METRICS_FILE, read_records
from trainer.retraining.publish import CURRENT, REFUSED, current_version
from trainer.retraining.report import write_days

PUBLISHED, PLAN, RESULT, REPORT = "published", "plan.json", "retrain.json", "report.md"
_NOT_DONE = (
    "holds no test record: its own lines say why; the same command goes on there"
)
_SCRIPTS = Path(__file__).resolve().parents[2] / "launch"


def retrain(config: RetrainConfig, scripts: Path = _SCRIPTS) -> dict:
    """Does what of the day's stages is left, and returns what retrain.json says. scripts: where launch/*.py are.

    Raises InputError: another retraining is at work in the folder, a stage failed (its own lines say why), or it cannot be
    written.
    """
    folder, seconds = Path(config.folder).resolve(), {}
    with _alone(folder):
        day = folder / "days" / config.name
        if (day / RESULT).is_file():
            return _read(day / RESULT)
        plan = _plan(config, folder, day)
        if not (day / "dataset").is_dir():
            _run(
                "extending the dataset",
                [
                    sys.executable,
                    scripts / "prepare.py",
                    *_prepare_words(config, plan, day),
                ],
                seconds,
            )
        if not (day / "trained").exists():
            _run(
                "training",
                [
                    *_launcher(config),
                    scripts / "train.py",
                    *_train_words(config, plan, day),
                ],
                seconds,
            )
            if not _is_tested(day / "run"):
                raise InputError(
                    f"training ended with status 0, but {day / 'run'} {_NOT_DONE}"
                )
            (day / "trained").touch()
        words = [
            *_launcher(config),
            scripts / "publish.py",
            *_publish_words(config, folder, day),
        ]
        _run(
            "publishing",
            words,
            seconds,
            expected=lambda: _serves(folder, day) or _refused(folder, day),
        )
        published = _serves(folder, day)
        if not published and not _refused(folder, day):
            raise InputError(
                f"publishing ended with status 0, but {day / 'run'} neither serves nor was refused: its own lines say why; "
                "the same command goes on there"
            )
        result = _result(config, folder, day, plan, published) | {"seconds": seconds}
        write_text(day / REPORT, report_of(result))
        write_days(folder, _results(folder, result))
        write_json(day / RESULT, result)
        _tidy(config, folder)
        return result


def report_of(result) -> str:
    """The changes report, Markdown."""
    lines = [f"# Retraining {result['name']}", ""]
    if result["published"]:
        lines += [f"Published as version {result['published']}.", ""]
    else:
        lines += [
            "**Not published.** Yesterday's model goes on serving. Against it speaks:",
            "",
        ]
        lines += [f"- {reason}" for reason in result["reasons"]]
        lines += [
            "",
            "Its logs are in no later dataset: give them again once they are right.",
            "",
        ]
    lines += [
        "## NDCG@10 on the newest held-out items",
        "",
        "| domain | users | candidate | current | 95 % | when published |",
    ]
    lines += ["|---|---:|---:|---:|---|---:|"]
    for name, figures in result["domains"].items():
        interval = (figures["difference"] or {}).get("interval")
        within = (
            "–" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        )
        numbers = [_number(figures[which]) for which in ("candidate", "current")]
        users = f"{figures['users']:,}" + ("" if figures["newest"] else " (all)")
        lines.append(
            f"| {name} | {users} | {' | '.join(numbers)} | {within} | {_number(figures['when_published'])} |"
        )
    if result["extension"]:
        facts = result["extension"]
        lines += ["", "## Logs", ""]
        lines.append(
            f"{facts['arrived']:,} rows came; {facts['delivered_before']:,} had come before, {facts['late']:,} were late, "
            f"{facts['before_window']:,} older than the window. {facts['users']['before']:,} users became "
            f"{facts['users']['now']:,}."
            + (" Domains were laid out anew." if facts["laid_out_anew"] else "")
        )
        lines += [
            "",
            "| domain | items | new | retired | interactions | before |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, own in facts["domains"].items():
            numbers = [
                own[key]
                for key in (
                    "items",
                    "new",
                    "retired",
                    "interactions",
                    "interactions_before",
                )
            ]
            lines.append(
                f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |"
            )
    if result["drift"]:
        lines += [
            "",
            "## How far item vectors moved",
            "",
            "| domain | items in both | mean cosine | lowest 5 % |",
        ]
        lines += ["|---|---:|---:|---:|"]
        for name, own in result["drift"].items():
            lines.append(
                f"| {name} | {own['items']:,} | {own['mean']:.3f} | {own['p5']:.3f} |"
            )
    seconds = ", ".join(
        f"{what} {spent:,.0f} s" for what, spent in result["seconds"].items()
    )
    return "\n".join([*lines, "", f"Time: {seconds}.", ""])


def drift(before: Path, after: Path) -> dict:
    """By domain, the cosines between the vectors that items of two exports have in both: how many, their mean and p5."""
    found = {}
    known = {facts["name"]: before / facts["folder"] for facts in _domains(before)}
    for facts in _domains(after):
        if facts["name"] not in known:
            continue
        places = [known[facts["name"]], after / facts["folder"]]
        old_ids, new_ids = (_ids(place) for place in places)
        where = pc.index_in(new_ids, value_set=old_ids).to_numpy(zero_copy_only=False)
        new_places = np.flatnonzero(~np.isnan(where.astype(np.float64)))
        old_places = where[new_places].astype(np.int64)
        old, new = (
            np.load(place / "items.npy", mmap_mode="r", allow_pickle=False)
            for place in places
        )
        if not len(new_places) or old.shape[1] != new.shape[1]:
            continue
        pair = (
            np.asarray(old[old_places], np.float64),
            np.asarray(new[new_places], np.float64),
        )
        lengths = np.maximum(
            np.prod([np.linalg.norm(each, axis=1) for each in pair], axis=0), 1e-30
        )
        cosines = (pair[0] * pair[1]).sum(1) / lengths
        found[facts["name"]] = {
            "items": len(cosines),
            "mean": float(cosines.mean()),
            "p5": float(np.quantile(cosines, 0.05)),
        }
    return found


def _domains(model):
    """What an export's schema says of its domains. Raises InputError where a folder is none of its own."""
    domains = _read(model / "schema.json")["domains"]
    for facts in domains:
        if not re.fullmatch(r"domain-\d+", facts["folder"]):
            raise InputError(
                f"{model / 'schema.json'}: {facts['folder']!r} is no domain's folder"
            )
    return domains


def _plan(config, folder, day):
    """What the retraining begins from, as it was when it first began."""
    if (day / PLAN).is_file():
        plan = _own_places(day / PLAN, _read(day / PLAN))
        if plan["input"] != config.input:
            raise InputError(
                f"{day}: was begun with input {plan['input']}, not {config.input}: give that, or another name"
            )
        return plan
    current = current_version(folder / PUBLISHED)
    base = _day_of(folder, current)
    plan = {
        "name": config.name,
        "input": config.input,
        "number": 1
        + max(
            (_read(file)["number"] for file in folder.glob(f"days/*/{PLAN}")), default=0
        ),
        "extends": None if base is None else f"days/{base['name']}/dataset",
        "warm_start": None if current is None else current["run"],
        "before": None
        if current is None
        else json.loads((folder / PUBLISHED / CURRENT).read_text())["model"],
    }
    _own_places(day / PLAN, plan)
    day.mkdir(parents=True, exist_ok=True)
    write_json(day / PLAN, plan)
    return plan


def _own_places(file, plan):
    """The plan. Raises InputError where a record in the folder has led it elsewhere: its places become words of commands."""
    forms = {
        "extends": r"days/(?!\.)[^/]+/dataset",
        "before": r"versions/\d+/model",
        "warm_start": r"(?!.*\$\{).+",  # a run's folder may lie anywhere
    }
    for name, form in forms.items():
        place = plan.get(name)
        if place is not None and not (
            isinstance(place, str) and re.fullmatch(form, place)
        ):
            raise InputError(
                f"{file}: {name} is {place!r}, which no retraining here writes: remove the day's folder"
            )
    if not isinstance(plan.get("number"), int):
        raise InputError(
            f"{file}: its number is {plan.get('number')!r}: remove the day's folder"
        )
    return plan


def _day_of(folder, current):
    """The retrain.json of the day whose model serves; where another run's does, of the newest day
    that was published."""
    published = [result for result in _results(folder) if result["published"]]
    for result in published:
        if current is not None and (
            folder / "days" / result["name"] / "run"
        ).resolve() == Path(current["run"]):
            return result
    return published[-1] if published else None


def _prepare_words(config, plan, day):
    words = [
        "--input",
        *config.input,
        "--output",
        day / "dataset",
        "--keep-log",
        "--memory",
        config.memory,
    ]
    for role in ("user", "item", "domain", "time"):
        words += [f"--{role}-column", getattr(config, f"{role}_column")]
    words += ["--min-user", config.min_user, "--min-item", config.min_item]
    words += ["--domain", config.domain] if config.domain else []
    words += ["--days", config.days] if config.days else []
    words += ["--time-unit", config.time_unit] if config.time_unit else []
    if plan["extends"] is not None:
        words += [
            "--extend",
            day.parents[2] / plan["extends"],
            *(["--retire"] if config.retire else []),
        ]
    return words


def _train_words(config, plan, day):
    words = [word for file in config.base for word in ("--config", file)]
    words += [f"data={day / 'dataset'}", f"run={day / 'run'}", *config.settings]
    if plan["warm_start"] is not None:
        words += [f"warm_start={plan['warm_start']}", *config.warm_settings]
    return words


def _publish_words(config, folder, day):
    words = [
        "--candidate",
        day / "run",
        "--to",
        folder / PUBLISHED,
        "--tolerance",
        config.tolerance,
        "--fall",
        config.fall,
    ]
    words += ["--domain-fall", config.domain_fall, "--own-fall", config.own_fall]
    return [*words, "--least-users", config.least_users, "--keep", config.keep]


def _launcher(config):
    return config.launcher or [sys.executable]


def _is_tested(run):
    """Whether a run has come to its end, which is when its best model is tested."""
    try:
        return any(
            record["kind"] == "test" for record in read_records(run / METRICS_FILE)
        )
    except OSError:
        return False


def _serves(folder, day):
    """Whether this day's candidate is the version that serves."""
    current = current_version(folder / PUBLISHED)
    return current is not None and Path(current["run"]) == (day / "run").resolve()


def _refused(folder, day):
    """Whether this day's candidate is the one that was refused last."""
    file = folder / PUBLISHED / REFUSED
    return file.is_file() and Path(_read(file)["run"]) == (day / "run").resolve()


def _run(what, words, seconds, expected=lambda: False):
    """A stage in a process of its own, whose output is ours; its time goes to `seconds`. Returns its status; raises InputError
    for any but 0, unless `expected` says that it means no failure."""
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)
    begun = time.monotonic()
    status = subprocess.run([str(word) for word in words]).returncode
    seconds[what] = time.monotonic() - begun
    if status and not expected():
        raise InputError(
            f"{what} ended with status {status}: its own lines say why; the same command goes on there"
        )
    return status


def _result(config, folder, day, plan, published):
    record = (
        current_version(folder / PUBLISHED)
        if published
        else _read(folder / PUBLISHED / REFUSED)
    )
    extension = day / "dataset" / EXTENSION / "extension.json"
    moved = {}
    if (
        published
        and plan["before"] is not None
        and (folder / PUBLISHED / plan["before"]).is_dir()
    ):
        moved = drift(
            folder / PUBLISHED / plan["before"],
            folder / PUBLISHED / "versions" / record["number"] / "model",
        )
    return {
        "name": config.name,
        "number": plan["number"],
        "published": record["number"] if published else None,
        "reasons": record["reasons"],
        "domains": record["domains"],
        "extension": _read(extension) if extension.is_file() else None,
        "drift": moved,
    }


def _results(folder, *more):
    """What every day's retrain.json says, and more such, in the order of the days. Raises InputError where one says that it is
    another folder's: by their names folders are removed."""
    results = list(more)
    for file in folder.glob(f"days/*/{RESULT}"):
        result = _read(file)
        if result.get("name") != file.parent.name or not isinstance(
            result.get("number"), int
        ):
            raise InputError(f"{file}: is not this day's: remove the day's folder")
        results.append(result)
    return sorted(results, key=lambda result: result["number"])


def _tidy(config, folder):
    """Takes datasets and runs away that nothing needs any more: those of the newest days and of published versions stay."""
    results = _results(folder)
    versions = [
        _read(file) for file in (folder / PUBLISHED / "versions").glob("*/version.json")
    ]
    runs = {Path(version["run"]) for version in versions}
    for result in results[: -config.keep_days]:
        day = folder / "days" / result["name"]
        if (day / "run").resolve() not in runs:
            for part in ("dataset", "run"):
                shutil.rmtree(day / part, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = exclusive(folder / ".lock")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    if lock is None:
        raise InputError(
            f"{folder}: another retraining is at work here: wait for it or stop it"
        )
    with lock:
        yield


def _ids(folder):
    """The raw ids of an export's domain as text."""
    stored = load_file(folder / "ids.safetensors")
    text, offsets = stored["bytes"].tobytes(), stored["offsets"]
    return pa.LargeStringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text)
    )


def _number(value):
    return "–" if value is None else f"{value:.4f}"


def _read(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
