"""DeepSpeed's own JSON, as a part of a run's configuration."""

import json
from pathlib import Path

from trainer.errors import InputError


def read_deepspeed_json(file):
    """A DeepSpeed configuration file as a dict."""
    try:
        given = json.loads(Path(file).read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise InputError(f"{file}: is no JSON object; DeepSpeed's configuration is one")
    return given


def asks_for_bf16(deepspeed_config):
    """True where DeepSpeed's own bf16 section is enabled; the model then computes in bf16 by autocast."""
    return _enabled(deepspeed_config, "bf16") or _enabled(
        deepspeed_config, "torch_autocast"
    )


def _enabled(config, section):
    value = config.get(section)
    return bool(value.get("enabled", False)) if isinstance(value, dict) else bool(value)
