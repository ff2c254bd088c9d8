"""Exports a trained model to a folder that a service loads (inference), or counts newer logs for one.

    python launch/export.py --run DIR --output DIR               the export
    torchrun --nproc-per-node 4 -- launch/export.py --of DIR …   a table over ranks
    … --dtype fp16                                               item vectors in half precision
    … --faiss HNSW32                                             and a FAISS index of each domain
    … --recency-term                                             scores know what was touched lately
    python launch/export.py --model DIR --refresh-counts LOGS    newer logs enter these scores
    … --output DIR                                               in a new folder, not in its place

It has user encoder, item vectors, vocabularies, schema and an example, and needs PyTorch, NumPy and
safetensors alone. DIR/example.py answers "history in, items out" (DIR/example.py --help):
python DIR/example.py DOMAIN 10 TIME:DOMAIN:ITEM … --refresh-counts needs no PyTorch, and takes logs
as prepare does, or a dataset that was extended with them.
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launch.stack import check_stack
from trainer.config.command_line import option, parse_options
from trainer.config.command_line.common_options import (
    Device,
    LogColumns,
    RecencyTerm,
)
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError, exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options(LogColumns, RecencyTerm, Device):
    """The command line."""

    # torchrun takes --run for the beginning of an option of its own, wherever it stands.
    run: str | None = option(
        "the folder of a finished run; under torchrun write --of",
        None,
        flags=("--run", "--of"),
        metavar="DIR",
    )
    data: str | None = option(
        "the prepared dataset, where it is not where the run found it",
        None,
        metavar="DIR",
    )
    output: str | None = option(
        "a folder that does not exist yet", None, metavar="DIR"
    )
    dtype: str = option("of the item vectors: fp32 or fp16", "fp32")
    faiss: str | None = option(
        "also a FAISS index: Flat, HNSW32, IVF1024,PQ32, …",
        None,
        metavar="INDEX",
    )
    model: str | None = option(
        "an exported folder, for --refresh-counts", None, metavar="DIR"
    )
    refresh_counts: tuple[str, ...] = option(
        "newer logs, or the one dataset that has them", (), metavar="PATH"
    )
    log_domain: str | None = option(
        "the one domain of logs without a domain column", None, metavar="NAME"
    )
    memory: str = option(
        "that reading the logs keeps to", "8GB", metavar="SIZE"
    )
    json: bool = option("print JSON in one line in place of a table", False)


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Exports the run's best model, or counts newer logs for an exported folder."""
    options = parse()
    if options.model is not None or options.refresh_counts:
        _refresh(options)
        return
    if options.run is None or options.output is None:
        raise InputError(
            "--run DIR and --output DIR are needed: the run, and the folder that gets its model"
        )
    check_stack(options.device)
    from trainer.config.serving import ExportConfig
    from trainer.distributed import process_group
    from trainer.serving.export import export_run

    config = ExportConfig(
        options.dtype, options.faiss, options.wants_recency_term()
    )
    with process_group.join_process_group(device=options.device) as ranks:
        schema = export_run(
            options.run, options.output, ranks, config, options.data
        )
    if ranks.first:
        _show_export(options, schema)


def _show_export(options: Options, schema: dict[str, Any]) -> None:
    """Prints what was exported."""
    if options.json:
        print(json.dumps(schema))
        return
    items = sum(domain["items"] for domain in schema["domains"])
    size = sum(file["bytes"] for file in schema["files"].values())
    print(
        f"{options.output}: {len(schema['domains'])} domains, {items:,} items, "
        f"{size / 1e6:,.1f} MB"
    )


def _refresh(options: Options) -> None:
    """Counts newer logs for the exported folder. Loads no PyTorch."""
    from trainer.config.serving import RefreshConfig
    from trainer.serving.refresh_counts import refresh_counts

    if options.model is None:
        raise InputError(
            "--model DIR is missing: the exported folder whose counts are refreshed"
        )
    if options.run is not None:
        raise InputError(
            "--run is for a new export, --refresh-counts for one that is there: leave one out"
        )
    config = RefreshConfig(
        inputs=options.refresh_counts,
        log_domain=options.log_domain,
        memory=options.memory,
        **options.log_settings(),
    )
    record = refresh_counts(options.model, config, options.output)
    if options.json:
        print(json.dumps(record))
        return
    folder = options.output or options.model
    print(f"{folder}: {record['events']:,} events of its items counted")
    for name, why in (
        ("older", "events are not newer than what was counted"),
        ("unknown_items", "events are of items that the model does not know"),
        ("unknown_domains", "events are of domains that it does not know"),
    ):
        if record[name]:
            print(f"  {record[name]:,} {why}: left out")


if __name__ == "__main__":
    run_script(main)
