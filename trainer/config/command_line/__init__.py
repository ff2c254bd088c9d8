"""The command line of all scripts: a dataclass becomes options (trainer.config.command_line.parse)."""

from trainer.config.command_line.option import option
from trainer.config.command_line.parse import parse_options

__all__ = ["option", "parse_options"]
