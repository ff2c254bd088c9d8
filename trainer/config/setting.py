"""A setting: a dataclass field that carries its help line, and when it may change.

The metadata keys are those of plain `dataclasses.field(metadata=…)` too, for packages that do not
import the trainer (syncrec.config, embeddings.config):

    help            one line of help
    on_resume       whether the setting may change when a run is resumed
    on_warm_start   whether it may differ from the run whose model a warm start begins with
    on_each_host    whether it may differ between the hosts of one run
    unrecorded      what it was in runs of before, whose records do not have it

What may change on resume may change on a warm start too. A key that is absent means no.
"""

import dataclasses
from typing import Any

# `on_resume` of a setting that may change unless the schedule falls towards the last step.
CONSTANT_SCHEDULE = "with optimizer.schedule=constant"

# `on_resume` of a section of free keys, of which some may change: their names.
ChangeRule = bool | str | tuple[str, ...]


def setting(
    default: Any,
    help: str,
    on_resume: ChangeRule = False,
    on_warm_start: bool = False,
    on_each_host: bool = False,
    **metadata: Any,
) -> Any:
    """A dataclass field with its help line and rules of change.

    default: the value, or a function that makes one (a list, a dict, a section). metadata: further
    keys, which trainer.config.command_line reads. Raises ValueError where the help is no line.
    """
    if not help or "\n" in help:
        raise ValueError(f"the help of a setting is one line, not {help!r}")
    metadata |= {
        "help": help,
        "on_resume": on_resume,
        "on_warm_start": on_warm_start,
        "on_each_host": on_each_host,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(field: dataclasses.Field[Any]) -> str:
    """A field's help line; empty where it has none."""
    return field.metadata.get("help", "")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; dataclasses.MISSING where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
