"""Exports a trained model to a folder that a service loads with PyTorch, NumPy and safetensors alone.

    python launch/export.py --run DIR --output DIR               user encoder, item vectors, vocabularies, schema, example
    torchrun --nproc-per-node 4 -- launch/export.py …            the same, where one rank cannot hold the table
    … --dtype fp16                                               item vectors in half precision
    … --faiss HNSW32                                             and a FAISS index of each domain, by FAISS's name for it

DIR/example.py answers "history in, items out": python DIR/example.py DOMAIN 10 DOMAIN:ITEM …
"""

import json

from launch.options import of_a_run
from launch.stack import check_stack
from trainer.distributed.process_exit import run_script
from trainer.errors import exit_on_input_error


def parse(arguments=None):
    """The command line."""
    parser = of_a_run(__doc__, "the schema in one line")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet",
    )
    parser.add_argument(
        "--dtype", default="fp32", help="of the item vectors: fp32 (default) or fp16"
    )
    parser.add_argument(
        "--faiss",
        metavar="INDEX",
        help="also a FAISS index: Flat, HNSW32, IVF1024,PQ32, …",
    )
    return parser.parse_args(arguments)


@exit_on_input_error
def main():
    """Loads the run's best model and exports it."""
    check_stack()
    options = parse()

    from trainer.distributed import process_group
    from trainer.serving.export import ExportConfig, export_run

    config = ExportConfig(options.dtype, options.faiss)
    with process_group.joined() as ranks:
        schema = export_run(options.run, options.output, ranks, config, options.data)
    if ranks.first:
        items = sum(domain["items"] for domain in schema["domains"])
        size = sum(file["bytes"] for file in schema["files"].values())
        told = f"{options.output}: {len(schema['domains'])} domains, {items:,} items, {size / 1e6:,.1f} MB"
        print(json.dumps(schema, ensure_ascii=False) if options.json else told)


if __name__ == "__main__":
    run_script(main)
