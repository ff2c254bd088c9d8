"""Exports a trained model to a folder that a service loads (inference).

    python launch/export.py --run DIR --output DIR               the export
    torchrun --nproc-per-node 4 -- launch/export.py --of DIR …   a table over ranks
    … --dtype fp16                                               item vectors in half precision
    … --faiss HNSW32                                             and a FAISS index of each domain

It has user encoder, item vectors, vocabularies, schema and an example, and needs PyTorch, NumPy and
safetensors alone. DIR/example.py answers "history in, items out" (DIR/example.py --help):
python DIR/example.py DOMAIN 10 TIME:DOMAIN:ITEM …
"""

from trainer.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import json
from collections.abc import Iterable
from dataclasses import dataclass

from launch.options import FinishedRun
from launch.stack import check_stack
from trainer.config.command_line import option, parse_options
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


@dataclass(frozen=True, kw_only=True)
class Options(FinishedRun):
    """The command line."""

    output: str = option("a folder that does not exist yet", metavar="DIR")
    dtype: str = option("of the item vectors: fp32 or fp16", "fp32")
    faiss: str | None = option(
        "also a FAISS index: Flat, HNSW32, IVF1024,PQ32, …",
        None,
        metavar="INDEX",
    )


def parse(arguments: Iterable[str] | None = None) -> Options:
    """The command line."""
    return parse_options(Options, __doc__, arguments)


@exit_on_input_error
def main() -> None:
    """Loads the run's best model and exports it."""
    options = parse()
    check_stack(options.device)
    from trainer.config.serving import ExportConfig
    from trainer.distributed import process_group
    from trainer.serving.export import export_run

    config = ExportConfig(options.dtype, options.faiss)
    with process_group.join_process_group(device=options.device) as ranks:
        schema = export_run(
            options.run, options.output, ranks, config, options.data
        )
    if not ranks.first:
        return
    if options.json:
        print(json.dumps(schema))
        return
    items = sum(domain["items"] for domain in schema["domains"])
    size = sum(file["bytes"] for file in schema["files"].values())
    print(
        f"{options.output}: {len(schema['domains'])} domains, {items:,} items, "
        f"{size / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    run_script(main)
