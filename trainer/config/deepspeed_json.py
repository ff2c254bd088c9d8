"""DeepSpeed's own JSON, as a part of a run's configuration."""

import json
from pathlib import Path
from typing import Any

from trainer.errors import InputError


def read_deepspeed_json(file: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed configuration file. Raises InputError that names the file."""
    try:
        config = json.loads(Path(file).read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: is no JSON object; DeepSpeed's configuration is one")
    return config


def asks_for_bf16(deepspeed_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed's bf16 or torch_autocast is enabled: the model then runs in bf16 (autocast)."""
    return section_enabled(deepspeed_config, "bf16") or section_enabled(
        deepspeed_config, "torch_autocast"
    )


def section_enabled(config: dict[str, Any], section: str) -> bool:
    """Whether a section of DeepSpeed's configuration says `enabled`, or is true itself."""
    value = config.get(section)
    if isinstance(value, dict):
        return bool(value.get("enabled", False))
    return bool(value)


_enabled = section_enabled  # its former name
