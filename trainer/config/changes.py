"""Which settings may change: on resume, on a warm start, and from host to host.

Each setting says so beside itself (trainer.config.setting). The sets here have dotted keys; the key
of a section (`log`) or of a part of a free section (`deepspeed.zero_optimization`) stands for all
keys below it.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, cast

from trainer.config.run import RunConfig
from trainer.config.setting import CONSTANT_SCHEDULE


def iterate_settings(
    kind: type = RunConfig,
) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yields (dotted key, field) of every setting and every section of a configuration."""
    for field in dataclasses.fields(kind):
        yield field.name, field
        if dataclasses.is_dataclass(field.type):
            for key, inner in iterate_settings(cast(type, field.type)):
                yield f"{field.name}.{key}", inner


def may_change_on_resume(constant_schedule: bool = True) -> set[str]:
    """The keys that may change when a run is resumed from a checkpoint.

    They change where things lie, how fast they go, or how far, not what a step computes.
    constant_schedule: whether the learning rate does not fall towards the last step; otherwise
    what moves the last step may not change.
    """
    keys = set()
    for key, field in iterate_settings():
        rule = field.metadata.get("on_resume", False)
        if rule == CONSTANT_SCHEDULE:
            allowed = constant_schedule
        else:
            allowed = rule is True
        if allowed:
            keys.add(key)
        if isinstance(rule, tuple):
            keys.update(f"{key}.{name}" for name in rule)
    return keys


def may_change_on_warm_start() -> set[str]:
    """The keys in which a run may differ from the one whose model its warm start begins with.

    They say how it learns, and on what; and all that may change on resume.
    """
    keys = may_change_on_resume()
    for key, field in iterate_settings():
        if field.metadata.get("on_warm_start", False):
            keys.add(key)
    return keys


def may_differ_by_host() -> set[str]:
    """The keys of places, and of how files are fetched there: each host may have its own."""
    keys = set()
    for key, field in iterate_settings():
        if field.metadata.get("on_each_host", False):
            keys.add(key)
    return keys


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a dotted key, or a section that it lies in, is among the allowed ones."""
    names = key.split(".")
    for length in range(1, len(names) + 1):
        if ".".join(names[:length]) in allowed:
            return True
    return False


def refused_changes(
    before: dict[str, Any], now: dict[str, Any], allowed: Collection[str]
) -> list[str]:
    """The keys, sorted, that have changed and may not.

    before, now: values by dotted key, as `trainer.config.load.flat` gives them, of a record and of
    today. A recorded on or off is the boolean that the setting has become. A setting that records of
    before do not have was what it says it was then (`unrecorded`).
    """
    keys = []
    unrecorded = _unrecorded_values()
    for key in sorted(before.keys() | now.keys()):
        old = before.get(key, unrecorded.get(key))
        new = now.get(key)
        if isinstance(new, bool) and old in ("on", "off"):
            old = old == "on"
        if old != new and not is_allowed(key, allowed):
            keys.append(key)
    return keys


def _unrecorded_values() -> dict[str, Any]:
    """What a setting was in runs that do not record it, by its dotted key."""
    values = {}
    for key, field in iterate_settings():
        if "unrecorded" in field.metadata:
            values[key] = field.metadata["unrecorded"]
    return values
