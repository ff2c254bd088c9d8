"""Publishing a model where it is not worse than the one that serves, and only whole.

    PUBLISHED/versions/0001/model/         what launch/export.py writes, for services
    PUBLISHED/versions/0001/version.json   the run and dataset it is of, and how well it did
    PUBLISHED/current.json                 names the version that serves; replaced in one move
    PUBLISHED/refused.json                 why the newest candidate was not published, if it was not

Both models rank the newest held-out items of the candidate's dataset: those of users who came with its newest logs, as the
current model would have met them. A candidate is refused where a domain is worse than the tolerance, and where the day itself
is unlike those before: where the figure falls far below the one with which the current model was published, or where it makes
far less difference than then whose item it is (trainer/evaluation/personalization.py).
"""

import contextlib
import datetime
import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer.checkpoint.best_model import TableSlot, best_model, config_of, open_run
from trainer.checkpoint.save import best_checkpoint
from trainer.config.retraining import PublishConfig
from trainer.data.format.dataset import File, stays_inside
from trainer.data.prepare.extend import EXTENSION
from trainer.distributed.agreement import by_the_first
from trainer.distributed.consensus import on_all_ranks, require_same
from trainer.errors import InputError
from trainer.evaluation.bootstrap import GroupMeans
from trainer.evaluation.personalization import DrawnUsers, own_item_gains
from trainer.evaluation.sampled import evaluate_split
from trainer.files.atomic import Patience, move_folder, patiently, write_json
from trainer.files.staged import exclusive
from trainer.reporting.run_log import HEADLINE
from trainer.run_files import CURRENT, MODEL, REFUSED, VERSION
from trainer.serving.example import load_encoder, plain_program
from trainer.serving.export import ENCODER, SCHEMA, ExportConfig, export_run

_UNLIKE = "the logs are unlike those before"


def publish(candidate, published, ranks, config: PublishConfig, data=None) -> dict:
    """Compares a finished run's model with the current one, and publishes or refuses it. Called on all ranks; returns the
    record, whose `published` is the version's number or None, and whose `reasons` say why not.

    data: the candidate's dataset where it has moved. A run that is published already is left as it is. Raises InputError: the
    candidate cannot be used, another process publishes here, or nothing can be written; `current.json` is then as it was.
    """
    published = Path(published)
    with _alone(published, ranks):
        current = by_the_first(lambda: current_version(published), ranks.first)
        run_config, dataset = open_run(
            candidate, data, of_all_domains=True, ranks=ranks
        )
        _, best, _ = best_checkpoint(Path(candidate), ranks)
        identity = {
            "run": str(Path(candidate).resolve()),
            "best": best,
            "dataset": dataset.fingerprint,
        }
        if current and all(
            current.get(name) == value for name, value in identity.items()
        ):
            return current | {"published": current["number"], "reasons": []}
        slot = TableSlot()  # one table for both models, and for what is exported
        others_U = None
        if current is not None:
            other_config = config_of(current["run"])
            others_U, _ = _ranks(
                *best_model(current["run"], other_config, dataset, ranks, slot),
                other_config,
                dataset,
                ranks,
            )
        trained = best_model(candidate, run_config, dataset, ranks, slot)
        record = identity | _compared(
            trained, others_U, current, run_config, dataset, ranks, config
        )
        record["reasons"] = reasons_against(record["domains"], config)
        if record["reasons"]:
            return by_the_first(lambda: _refuse(published, record), ranks.first)
        number = by_the_first(lambda: _begin(published), ranks.first)
        partial = published / "versions" / f"{number}.partial"
        export_run(
            candidate, partial / MODEL, ranks, ExportConfig(config.dtype), data, trained
        )
        return by_the_first(
            lambda: _finish(published, partial, record | {"number": number}, config),
            ranks.first,
        )


def reasons_against(domains, config: PublishConfig) -> list[str]:
    """What speaks against publishing, a line a domain and rule. domains: as `publish` records them."""
    found, pairs = [], {}
    for name, figures in domains.items():
        candidate, current, then = (
            figures[which] for which in ("candidate", "current", "when_published")
        )
        if candidate is None or current is None:
            continue
        if candidate < (1 - config.tolerance) * current:
            found.append(
                f"{name}: {HEADLINE} {candidate:.4f}, the current model has {current:.4f}"
            )
        if then:
            pairs[name] = candidate, then
            if candidate < (1 - config.domain_fall) * then:
                found.append(
                    f"{name}: {HEADLINE} {candidate:.4f}, {then:.4f} when the current model was published: {_UNLIKE}"
                )
    if pairs:
        now, then = (
            float(np.mean(figures)) for figures in zip(*pairs.values(), strict=True)
        )
        if now < (1 - config.fall) * then:
            changes = ", ".join(
                f"{name} {100 * (each / before - 1):+.0f} %"
                for name, (each, before) in pairs.items()
            )
            found.append(
                f"mean {HEADLINE} {now:.4f}, {then:.4f} when the current model was published: {_UNLIKE} ({changes})"
            )
    gains = {
        name: (figures["own_item"], figures["own_item_then"])
        for name, figures in domains.items()
        if figures.get("own_item") is not None
        and figures.get("own_item_then") is not None
    }
    if gains:
        now, then = (float(np.mean(of)) for of in zip(*gains.values(), strict=True))
        if then > 0 and now < (1 - config.own_fall) * then:
            changes = ", ".join(
                f"{name} {each:.4f} after {before:.4f}"
                for name, (each, before) in gains.items()
            )
            found.append(
                f"a held-out item's {HEADLINE} is {now:.4f} higher for its own user than for another's, it was {then:.4f} "
                f"higher when the current model was published: items are not their users' ({changes})"
            )
    return found


def current_version(published: Path) -> dict | None:
    """What version.json says of the version that serves; None before the first. Raises InputError where it cannot be read."""
    file = published / CURRENT
    if not file.is_file():
        return None
    try:
        number = json.loads(file.read_text(encoding="utf-8"))["version"]
        if not (isinstance(number, str) and re.fullmatch(r"\d+", number)):
            raise ValueError(f"{number!r} is no version's number")
        return _record_of(published / "versions" / number / VERSION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be used ({error}): name a version that is there with --rollback"
        ) from None


def _record_of(file):
    """What a version.json says. Raises OSError, ValueError."""
    record = json.loads(file.read_text(encoding="utf-8"))
    kinds = {"number": str, "run": str, "domains": dict}
    valid = isinstance(record, dict)
    valid = valid and all(
        isinstance(record.get(name), kind) for name, kind in kinds.items()
    )
    valid = (
        valid and re.fullmatch(r"\d+", record["number"]) and record["run"].isprintable()
    )
    if not valid:
        raise ValueError(f"{file} is no version's record")
    for figures in record["domains"].values():
        before = (
            [figures.get(name) for name in ("candidate", "own_item")]
            if isinstance(figures, dict)
            else ["none"]
        )
        if not all(
            figure is None or isinstance(figure, int | float) for figure in before
        ):
            raise ValueError(f"{file}: its figures are none")
    return record


def roll_back(published, to=None) -> dict:
    """Makes an older version the current one: the newest before it, or the version `to`. Raises InputError where there is none,
    or its files are not whole."""
    published = Path(published)
    versions = _versions(published)
    try:
        current = json.loads((published / CURRENT).read_text(encoding="utf-8"))[
            "version"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        current = None
    if not isinstance(current, str):
        current = None
    if to is None:
        known = isinstance(current, str) and current.isdecimal()
        older = [number for number in versions if known and int(number) < int(current)]
        if not older:
            raise InputError(
                f"{published}: there is no version before {current}: there are {', '.join(versions) or 'none'}"
            )
        to = older[-1]
    if to not in versions:
        raise InputError(
            f"{published}: there is no version {to}: there are {', '.join(versions) or 'none'}"
        )
    try:
        record = _record_of(published / "versions" / to / VERSION)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{published}: version {to} cannot be used ({error}): name another"
        ) from None
    _check(published / "versions" / to)
    _point(published, to)
    return record


def _compared(trained, others_U, current, run_config, dataset, ranks, config):
    """Figures by domain of both models, on the users by whom a domain is judged. trained: what `best_model` gave of the
    candidate; others_U: the ranks by the current model, if there is one."""
    extended, came_U = _came(dataset)
    drawn = DrawnUsers(run_config, came_U if extended else np.ones(dataset.users, bool))
    rank_U, domain_U = _ranks(*trained, run_config, dataset, ranks, drawn)
    model, table, _ = trained
    gains = own_item_gains(
        model, table, run_config, dataset, ranks, drawn, config.least_users
    )
    found = {}
    for number, domain in enumerate(dataset.domains):
        own_U = (rank_U > 0) & (domain_U == number)
        newest_U = own_U & came_U
        judged_U = (
            newest_U if np.count_nonzero(newest_U) >= config.least_users else own_U
        )
        (users,) = np.nonzero(judged_U)
        means = GroupMeans(2, 1, run_config.seed)
        pair = rank_U, rank_U if others_U is None else others_U
        means.add(
            users,
            np.zeros((len(users), 1), np.int64),
            [each_U[users] for each_U in pair],
        )
        figures = [means.figures(system, 0)[HEADLINE] for system in (0, 1)]
        before = {} if current is None else current["domains"].get(domain.name, {})
        found[domain.name] = {
            "users": len(users),
            "newest": bool(judged_U is newest_U),
            "candidate": figures[0],
            "current": None if others_U is None else figures[1],
            "difference": None if others_U is None else means.difference(0, HEADLINE),
            "when_published": before.get("candidate"),
            "own_item": gains[number],
            "own_item_then": before.get("own_item"),
        }
    return {
        "domains": found,
        "against": None if current is None else current["number"],
        "config": asdict(config),
    }


def _came(dataset):
    """Whether the dataset extends another one, and which users came with its newest logs, (U,); the
    same on all ranks."""
    extended = on_all_ranks((dataset.folder / EXTENSION).is_dir)
    require_same({"a dataset with other newest logs": {"extended": extended}})
    came_U = np.zeros(dataset.users, bool)
    if extended:
        newest = dataset.folder / EXTENSION / "users.npy"
        patience = Patience(newest.parent)
        users = on_all_ranks(
            lambda: patiently(lambda: np.load(newest, allow_pickle=False), patience)
        )
        require_same(
            {
                "a dataset with other newest logs": {
                    "users": hashlib.sha256(users.tobytes()).hexdigest()[:16]
                }
            }
        )
        came_U[users] = True
    return extended, came_U


def _ranks(model, table, _best, config, dataset, ranks, drawn=None):
    """Each user's rank of the test item among the drawn ones, 0 of those without, and the item's domain; of all ranks. drawn: a
    DrawnUsers that sees them too."""
    found = torch.zeros(2, dataset.users, dtype=torch.int32)

    def visit(candidates, ranks_B, scores_C):
        real = candidates.user_B >= 0
        users = torch.from_numpy(candidates.user_B[real])
        found[0, users] = torch.from_numpy(ranks_B[real]).int()
        found[1, users] = torch.from_numpy(candidates.domain_B[real]).int()
        if drawn is not None:
            drawn.visit(candidates, ranks_B, scores_C)

    evaluate_split(model, table, dataset, ranks, config, "test", visit=visit)
    dist.all_reduce(found)
    return found.numpy()


@contextlib.contextmanager
def _alone(published, ranks):
    """Within it no other process publishes here."""
    lock = None

    def take():
        nonlocal lock
        try:
            published.mkdir(parents=True, exist_ok=True)
            lock = exclusive(published / ".lock")
        except OSError as error:
            raise InputError(
                f"{published} cannot be written: {error.strerror}"
            ) from None
        if lock is None:
            raise InputError(
                f"{published}: another process publishes here: wait for it or stop it"
            )

    try:
        by_the_first(take, ranks.first)
        yield
    finally:
        if lock is not None:
            lock.close()


def _versions(published):
    """Numbers of the versions that are there, as they are written, rising."""
    names = [
        path.name
        for path in (published / "versions").glob("[0-9]*")
        if path.name.isdecimal() and path.is_dir()
    ]
    return sorted(names, key=int)


def _refuse(published, record):
    record |= {"published": None, "time": _now()}
    write_json(published / REFUSED, record)
    return record


def _begin(published):
    """The next version's number, and its folder begun anew."""
    versions = published / "versions"
    versions.mkdir(exist_ok=True)
    for left in versions.glob("*.partial"):
        shutil.rmtree(left)
    number = f"{int((_versions(published) or ['0'])[-1]) + 1:04d}"
    (versions / f"{number}.partial").mkdir()
    return number


def _finish(published, partial, record, config):
    """Makes the version visible once it loads, and the one that serves; takes the oldest away."""
    record |= {"published": record["number"], "time": _now()}
    write_json(partial / VERSION, record)
    _check(partial)
    move_folder(partial, partial.with_suffix(""))
    _point(published, record["number"])
    (published / REFUSED).unlink(missing_ok=True)
    for number in _versions(published)[: -1 - config.keep]:
        shutil.rmtree(published / "versions" / number)
    return record


def _check(version):
    """Every file of the model is whole, its encoders hold programs and nothing else, and the first of them loads. Raises
    InputError."""
    folder = version / MODEL
    try:
        schema = json.loads((folder / SCHEMA).read_text(encoding="utf-8"))
        for name, facts in schema["files"].items():
            if not stays_inside(name):
                raise ValueError(f"{name!r} is no name of a file in it")
            if not (folder / name).is_file() or File.of(folder, name) != File(
                name, **facts
            ):
                raise InputError(
                    f"{folder / name}: is not as it was exported: publish the run again"
                )
        for file in folder.glob(f"*/{ENCODER}"):
            plain_program(file)
        load_encoder(folder / ENCODER)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: does not load ({error}): publish the run again"
        ) from None


def _point(published, number):
    write_json(
        published / CURRENT,
        {"version": number, "model": f"versions/{number}/{MODEL}", "since": _now()},
    )


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
