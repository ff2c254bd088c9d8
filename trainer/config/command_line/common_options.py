"""Options that several scripts have."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.command_line import option
from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a script computes on."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "what to compute on; auto: CUDA where there is a device", "auto"
    )


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Device):
    """A finished run, and its dataset."""

    # torchrun takes --run for the beginning of an option of its own, wherever it stands.
    run: str = option(
        "the folder of a finished run; under torchrun write --of",
        flags=("--run", "--of"),
        metavar="DIR",
    )
    data: str | None = option(
        "the prepared dataset, where it is not where the run found it",
        None,
        metavar="DIR",
    )
    json: bool = option("print JSON in one line in place of a table", False)


@dataclass(frozen=True, kw_only=True)
class LogColumns:
    """The columns of interaction logs."""

    user_column: str = option("of the logs", "user_id", metavar="NAME")
    item_column: str = option("of the logs", "item_id", metavar="NAME")
    domain_column: str = option("of the logs", "domain", metavar="NAME")
    time_column: str = option("of the logs", "timestamp", metavar="NAME")
    columns: str | None = option(
        "all columns of logs without a header line, with commas between",
        None,
        metavar="NAMES",
    )
    delimiter: str | None = option(
        "what divides the fields: ';', '|', '::', tab (default: by the file's "
        "ending)",
        None,
        metavar="SIGN",
    )
    time_format: str | None = option(
        "of times in text, e.g. '%d/%m/%Y %H:%M'",
        None,
        metavar="FORMAT",
    )
    where: str | None = option(
        "rows that count, e.g. \"rating >= 4 and event in ('buy', 'cart')\"",
        None,
        metavar="EXPRESSION",
    )
    items: str | None = option(
        "a file with the domain of every item, by the same column names",
        None,
        metavar="FILE",
    )
    items_columns: str | None = option(
        "all columns of an --items file without a header line",
        None,
        metavar="NAMES",
    )
    items_delimiter: str | None = option(
        "what divides the fields of --items (default: by its ending)",
        None,
        metavar="SIGN",
    )
    domain_separator: str | None = option(
        "what stands between several domains of one item; the first counts",
        None,
        metavar="SIGN",
    )
    bad_rows: Literal["stop", "skip"] = option(
        "at a row that cannot be used; skip counts and lists them", "stop"
    )

    def log_settings(self) -> dict[str, Any]:
        """The options as settings of `LogFormat`."""
        settings = {}
        for field in dataclasses.fields(LogColumns):
            value = getattr(self, field.name)
            if value is not None:
                settings[field.name] = value
        return settings


@dataclass(frozen=True, kw_only=True)
class ItemTitles:
    """Titles of items, for the report."""

    titles: str | None = option(
        "item titles for the report: Parquet, CSV, TSV or JSON Lines with item_id, title "
        "and maybe domain",
        None,
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """How much a training shows on the console."""

    quiet: bool = option("short for log.console=quiet", False)
    verbose: bool = option("short for log.console=verbose", False)

    def verbosity_settings(self) -> list[str]:
        """The options as a setting of a run. Raises InputError where both are given."""
        if self.quiet and self.verbose:
            raise InputError("--quiet and --verbose contradict: give one")
        if self.quiet:
            return ["log.console=quiet"]
        if self.verbose:
            return ["log.console=verbose"]
        return []


@dataclass(frozen=True, kw_only=True)
class RecencyTerm:
    """Whether scores know what was touched lately; by default as the run says."""

    recency_term: bool = option(
        "score with what was touched lately, too (a run with evaluation.recency_term=true does)",
        False,
    )
    skip_recency_term: bool = option(
        "score without it, whatever the run says", False
    )

    def wants_recency_term(self) -> bool | None:
        """What is asked for; None: as the run says. Raises InputError where both are given."""
        if self.recency_term and self.skip_recency_term:
            raise InputError(
                "--recency-term and --skip-recency-term contradict: give one"
            )
        if self.recency_term:
            return True
        return False if self.skip_recency_term else None
