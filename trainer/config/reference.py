"""The reference of all settings, docs/settings.md, generated from the configurations.

python -m trainer.config.reference > docs/settings.md
"""

import dataclasses
import sys
from typing import Any, cast

from trainer.config.changes import (
    is_allowed,
    may_change_on_resume,
    may_change_on_warm_start,
)
from trainer.config.command_line.describe import describe_type, describe_value
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
_COLUMNS = ["Key", "Type", "Default", "What it is"]
_COLUMNS_OF_CHANGE = ["Resume", "Warm start"]


def settings_page() -> str:
    """The text of docs/settings.md."""
    parts = [
        _HEAD,
        _run_table(),
        *_section_tables(),
        _table_of("Publishing: `launch/publish.py`", PublishConfig),
        _table_of("Retraining: `launch/retrain.py`", RetrainConfig),
    ]
    return "\n".join(parts)


def _run_table() -> str:
    """The table of a run's top level."""
    rows = []
    for field in dataclasses.fields(RunConfig):
        if not dataclasses.is_dataclass(field.type):
            rows.append(_row_of_run(field, field.name))
    table = _markdown(_COLUMNS + _COLUMNS_OF_CHANGE, rows)
    return f"## A run\n\n{table}"


def _section_tables() -> list[str]:
    """A table for each section of a run."""
    tables = []
    for section in dataclasses.fields(RunConfig):
        if not dataclasses.is_dataclass(section.type):
            continue
        rows = []
        for field in dataclasses.fields(section.type):
            key = f"{section.name}.{field.name}"
            rows.append(_row_of_run(field, key))
        table = _markdown(_COLUMNS + _COLUMNS_OF_CHANGE, rows)
        summary = _first_line(cast(type, section.type))
        tables.append(f"## `{section.name}`\n\n{summary}\n\n{table}")
    return tables


def _table_of(title: str, kind: type) -> str:
    """The table of a configuration that is no run's."""
    rows = []
    for field in dataclasses.fields(kind):
        rows.append(_row(field, field.name))
    table = _markdown(_COLUMNS, rows)
    return f"## {title}\n\n{_first_line(kind)}\n\n{table}"


def _row_of_run(field: dataclasses.Field[Any], key: str) -> list[str]:
    """The cells of a setting of a run, with when it may change."""
    if is_allowed(key, may_change_on_warm_start()):
        on_warm_start = "yes"
    else:
        on_warm_start = ""
    on_resume = _describe_resume(field, key)
    return [*_row(field, key), on_resume, on_warm_start]


def _row(field: dataclasses.Field[Any], key: str) -> list[str]:
    """The cells of a setting: key, type, default, help."""
    choices = field.metadata.get("choices")
    if choices is None:
        kind = describe_type(field.type)
    else:
        kind = ", ".join(choices)
    value = describe_value(default_of(field))
    if value != "–":
        value = f"`{value}`"
    return [f"`{key}`", kind, value, help_of(field)]


def _describe_resume(field: dataclasses.Field[Any], key: str) -> str:
    """When a setting may change on resume."""
    rule = field.metadata.get("on_resume", False)
    if rule == CONSTANT_SCHEDULE:
        return CONSTANT_SCHEDULE
    if isinstance(rule, tuple):
        return ", ".join(f"`{name}`" for name in rule)
    if is_allowed(key, may_change_on_resume()):
        return "yes"
    return ""


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    line = ["---"] * len(head)
    lines = []
    for cells in (head, line, *rows):
        joined = " | ".join(cells)
        lines.append(f"| {joined} |")
    return "\n".join(lines) + "\n"


def _first_line(kind: type) -> str:
    text = kind.__doc__ or ""
    lines = text.strip().splitlines()
    return lines[0]


if __name__ == "__main__":
    sys.stdout.write(settings_page())
