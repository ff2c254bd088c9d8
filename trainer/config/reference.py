"""The reference of all settings, docs/settings.md, generated from the configurations.

python -m trainer.config.reference > docs/settings.md
"""

import dataclasses
import sys
import types
from typing import Any, Literal, get_args, get_origin

from trainer.config.changes import (
    is_allowed,
    may_change_on_resume,
    may_change_on_warm_start,
)
from trainer.config.retraining import PublishConfig, RetrainConfig
from trainer.config.run import RunConfig
from trainer.config.setting import CONSTANT_SCHEDULE, default_of, help_of

_HEAD = """\
# Settings

Every setting of a run, of publishing and of retraining. This page is generated:
`python -m trainer.config.reference > docs/settings.md`.

A run's settings stand in YAML files (`--config`), and as `key=value` or `--key value` on the command
line. Later ones win. `python launch/train.py --show-config …` prints the effective configuration.

*Resume*: the setting may change when the same run goes on from a checkpoint. *Warm start*: it may
differ from the run whose model another one begins with (`warm_start=RUN`).
"""


def describe_type(kind: Any) -> str:
    """A setting's type in words: int, number, text, on/off, or its choices."""
    if isinstance(kind, types.UnionType):
        names = []
        for member in get_args(kind):
            if member is not types.NoneType:
                names.append(describe_type(member))
        return " or ".join(names)
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"list of {describe_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "section"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


_NAMES = {bool: "on/off", int: "int", float: "number", str: "text"}


def describe_value(value: Any) -> str:
    """A default as one writes it."""
    if value is dataclasses.MISSING:
        return "needed"
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        if not value:
            return "–"
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict) and not value:
        return "–"
    return str(value)


def settings_page() -> str:
    """The text of docs/settings.md."""
    parts = [_HEAD, _run_tables()]
    for kind, title in (
        (PublishConfig, "Publishing: `launch/publish.py`"),
        (RetrainConfig, "Retraining: `launch/retrain.py`"),
    ):
        parts.append(f"## {title}\n\n{_docline(kind)}\n\n{_plain_table(kind)}")
    return "\n".join(parts)


def _run_tables() -> str:
    """The tables of a run: its top level, then each section."""
    top = []
    sections = []
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            title = f"## `{field.name}`\n\n{_docline(field.type)}\n\n"
            rows = _rows_of_run(field.type, f"{field.name}.")
            sections.append(title + _table(rows))
        else:
            top += _rows_of_run(RunConfig, "", only=field.name)
    return "\n".join([f"## A run\n\n{_table(top)}", *sections])


def _rows_of_run(kind: type, start: str, only: str | None = None) -> list[list[str]]:
    rows = []
    for field in dataclasses.fields(kind):
        if only is not None and field.name != only:
            continue
        key = start + field.name
        rows.append([*_cells(field, key), *_cells_of_change(field, key)])
    return rows


def _cells(field: dataclasses.Field, key: str) -> list[str]:
    choices = field.metadata.get("choices")
    kind = ", ".join(choices) if choices else describe_type(field.type)
    value = describe_value(default_of(field))
    return [f"`{key}`", kind, f"`{value}`" if value != "–" else value, help_of(field)]


def _cells_of_change(field: dataclasses.Field, key: str) -> list[str]:
    """Whether it may change on resume, and on a warm start."""
    rule = field.metadata.get("on_resume", False)
    if rule == CONSTANT_SCHEDULE:
        on_resume = CONSTANT_SCHEDULE
    elif isinstance(rule, tuple):
        on_resume = ", ".join(f"`{name}`" for name in rule)
    elif is_allowed(key, may_change_on_resume()):
        on_resume = "yes"
    else:
        on_resume = ""
    on_warm_start = "yes" if is_allowed(key, may_change_on_warm_start()) else ""
    return [on_resume, on_warm_start]


def _table(rows: list[list[str]]) -> str:
    head = ["Key", "Type", "Default", "What it is", "Resume", "Warm start"]
    return _markdown(head, rows)


def _plain_table(kind: type) -> str:
    rows = []
    for field in dataclasses.fields(kind):
        rows.append(_cells(field, field.name))
    return _markdown(["Key", "Type", "Default", "What it is"], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        lines.append(_row(row))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _docline(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.stdout.write(settings_page())
