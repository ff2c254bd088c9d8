"""The command line of a script, from a dataclass: `--flag value` and `key=value` alike.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        run: str = option("the folder of a finished run", flags=("--of",))
        split: Literal["test", "validation"] = option("the items to rank", "test")
        fresh: bool = option("begin anew", False)

    options = parse_options(Options, __doc__)

Then `--run DIR --fresh`, `run=DIR fresh=on` and `--run=DIR --fresh=on` are the same. A field that is
a dataclass gives its own fields as options. A field with `settings_of` gets the settings of a
configuration, `key=value` or `--key value`, as `key=value` for `trainer.config.load`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, TypeVar, cast, get_origin

import trainer
from trainer.config.command_line.help import (
    HELP_COLUMN,
    describe_settings,
    help_width,
)
from trainer.config.command_line.option import Option, options_of
from trainer.config.command_line.words import WordRewriter
from trainer.config.setting import help_of

T = TypeVar("T")

PROGRAM = "syncrec-trainer"


def parse_options(
    kind: type[T],
    description: str | None,
    arguments: Iterable[str] | None = None,
) -> T:
    """The options of a script, as an instance of the dataclass `kind`.

    description: the script's docstring. arguments: None for those of this process. Ends the process
    with status 2, and a line on stderr, for an option that there is not.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    options = options_of(kind)
    settings = _settings_field(kind)
    parser = _parser(options, settings, description or "")
    if settings is None:
        rewriter = WordRewriter(options, None)
        words = rewriter.rewrite(list(arguments))
        values = parser.parse_args(words)
    else:
        rewriter = WordRewriter(options, settings.metadata["settings_of"])
        words = rewriter.rewrite(list(arguments))
        values = parser.parse_intermixed_args(words)
    return _build(kind, vars(values))


def _settings_field(kind: type) -> dataclasses.Field[Any] | None:
    """The field that gets the settings of a configuration."""
    for field in dataclasses.fields(kind):
        if "settings_of" in field.metadata:
            return field
    return None


def _build(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from the values by name; dataclasses in it too."""
    arguments = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(cast(type, field.type), values)
            continue
        value = values[field.name]
        if value is not None and get_origin(field.type) is tuple:
            value = tuple(value)
        arguments[field.name] = value
    return kind(**arguments)


def _parser(
    options: list[Option],
    settings: dataclasses.Field[Any] | None,
    description: str,
) -> argparse.ArgumentParser:
    usage = "%(prog)s [--option VALUE | option=VALUE] …"
    epilog = None
    if settings is not None:
        usage += " [key=VALUE] …"
        epilog = describe_settings(settings.metadata["settings_of"])
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=_formatter,
    )
    for option in options:
        option.add_to(parser)
    # DeepSpeed's launcher.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {trainer.__version__}",
        help="print the version and stop",
    )
    if settings is not None:
        parser.add_argument(
            settings.name,
            nargs="*",
            metavar="key=VALUE",
            help=help_of(settings),
        )
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(
        prog,
        max_help_position=HELP_COLUMN,
        width=help_width(),
    )
