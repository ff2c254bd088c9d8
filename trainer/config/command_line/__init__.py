"""The command line of all scripts: a dataclass becomes options (trainer.config.command_line.options)."""

from trainer.config.command_line.options import option, parse_options

__all__ = ["option", "parse_options"]
