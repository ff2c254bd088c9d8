"""Options that several scripts have."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.command_line import option


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


@dataclass(frozen=True, kw_only=True)
class ItemTitles:
    """Titles of items, for the report."""

    titles: str | None = option(
        "item titles for the report: Parquet, CSV, TSV or JSON Lines with item_id, title "
        "and maybe domain",
        None,
        metavar="FILE",
    )
