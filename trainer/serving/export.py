"""A finished run's best model as a folder that a service can load with PyTorch, NumPy and safetensors alone.

    schema.json              what is here: sizes, domains, types, the run's best step, every file's size and sha256
    encoder.pt2              the user encoder, a torch.export program (syncrec/export.py)
    domain-N/items.npy       the item vectors of the N-th domain (items, r), to be mapped from the disk
    domain-N/ids.safetensors their raw ids as UTF-8: bytes uint8, offsets int64 (items + 1)
    domain-N/index.faiss     where asked for: a FAISS index of the vectors, by inner product
    example.py               loads all this and recommends

A user's score of an item is the dot product of the encoder's output and the item's vector.
"""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save

from syncrec.export import UserEncoder, check_exportable, exported
from trainer.checkpoint.best_model import best_model, open_run
from trainer.data.format.dataset import File
from trainer.data.format.vocabulary import item_ids
from trainer.distributed.agreement import by_the_first
from trainer.errors import InputError
from trainer.files.atomic import move_folder
from trainer.files.progress import Stages
from trainer.serving.example import plain_program

FORMAT_VERSION = 2  # 2: the encoder is told times
SCHEMA, ENCODER = "schema.json", "encoder.pt2"
_DTYPES = {"fp32": np.float32, "fp16": np.float16}
_BLOCK = 65536  # item vectors brought to the first rank at once
_EXAMPLE = Path(__file__).with_name("example.py")


@dataclass(frozen=True)
class ExportConfig:
    """dtype: of the item vectors, fp32 or fp16. faiss: an index by FAISS's name for it (Flat, HNSW32, …), or None."""

    dtype: str = "fp32"
    faiss: str | None = None

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise InputError(f"dtype is {self.dtype!r}: give {' or '.join(_DTYPES)}")
        if self.faiss:
            _faiss_index(self.faiss, 8)


def export_run(
    run, output, ranks, config: ExportConfig, data=None, trained=None
) -> dict:
    """Writes the folder `output` and returns its schema. Called on all ranks; the first one writes.

    trained: what `best_model` gave of the run, where it has been read already; the model is on the CPU afterwards.
    Raises InputError for whatever is wrong with the run, and where `output` is there already or cannot be written: then there
    is no new output at all.
    """
    output = Path(output)
    partial = output.with_name(f".{output.name}.partial")
    run_config, dataset = open_run(run, data, of_all_domains=True, ranks=ranks)
    try:
        check_exportable(run_config.model)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from None
    by_the_first(lambda: _begin(output, partial), ranks.first)
    try:
        model, table, best = trained or best_model(run, run_config, dataset, ranks)
        with Stages(ranks.first) as stages:
            with stages(
                "exporting item vectors",
                total=sum(domain.items for domain in dataset.domains),
            ) as advance:
                for number, domain in enumerate(dataset.domains):
                    _write_items(
                        partial / f"domain-{number}",
                        table,
                        domain,
                        _DTYPES[config.dtype],
                        ranks,
                        advance,
                    )
            with stages("exporting the encoder"):
                return by_the_first(
                    lambda: _finish(
                        partial, output, model, dataset, best, run_config.model, config
                    ),
                    ranks.first,
                )
    except BaseException:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(output, partial):
    if output.exists():
        raise InputError(
            f"output {output} is there already: name another folder or remove it"
        )
    with _writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return None


@torch.no_grad()
def _write_items(folder, table, domain, dtype, ranks, advance):
    """The domain's vectors, a block at a time: no rank ever holds more of the others' rows.

    Appended, not mapped: a full disk kills a process that writes to a mapped file.
    """
    shape, described = (
        (domain.items, table.dim),
        np.lib.format.dtype_to_descr(np.dtype(dtype)),
    )
    for first in range(domain.start, domain.start + domain.items, _BLOCK):
        last = min(first + _BLOCK, domain.start + domain.items)
        wanted = (
            torch.arange(first, last)
            if ranks.first
            else torch.zeros(0, dtype=torch.int64)
        )
        vectors = table(wanted).cpu().numpy()

        def write():
            with _writing(folder):
                folder.mkdir(exist_ok=True)
                with open(folder / "items.npy", "ab") as file:
                    if file.tell() == 0:
                        header = {
                            "descr": described,
                            "fortran_order": False,
                            "shape": shape,
                        }
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(vectors, dtype).data)  # noqa: B023

        by_the_first(write, ranks.first)
        advance(last - first)


def _finish(partial, output, model, dataset, best, model_config, config):
    with _writing(partial):
        model = model.cpu()
        span = dataset.first_time, dataset.last_time
        domains = [
            _write_domain(partial, dataset, number, model, config.faiss)
            for number in range(len(dataset.domains))
        ]
        _write_encoder(partial, UserEncoder(model, span))
        shutil.copyfile(_EXAMPLE, partial / "example.py")
        names = sorted(
            str(path.relative_to(partial))
            for path in partial.rglob("*")
            if path.is_file()
        )
        files = [File.of(partial, name) for name in names]
        schema = {
            "format_version": FORMAT_VERSION,
            "width": model_config.dim,
            "max_length": model_config.max_length,
            "item_dtype": config.dtype,
            "first_time": dataset.first_time,
            "last_time": dataset.last_time,
            "domains": domains,
            "encoder": {
                "inputs": {
                    "items": "float32 (users, items, width): vectors of the newest items, oldest first; items: 1 to max_length",
                    "lengths": "int64 (users,): how many of them are the user's; 0 for a user without a history",
                    "times": "float64 (users, items): when they were, in the logs' unit (dates: microseconds since 1970)",
                    "now": "float64 (users,): for when is asked; later than last_time is as last_time",
                },
                "output": "float32 (users, width): a user's vector; its dot product with an item's is the score",
                "own": "a domain's own encoder is given its items alone; own_weight of a user's vector for the domain is its",
            },
            "best_step": best["step"],
            "dataset": dataset.fingerprint,
            "torch": metadata.version("torch"),
            "files": {
                file.name: {"bytes": file.bytes, "sha256": file.sha256}
                for file in files
            },
        }
        (partial / SCHEMA).write_text(
            json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        move_folder(partial, output)
    return schema


def _write_encoder(folder, encoder):
    program = io.BytesIO()  # a full disk ends a process that lets PyTorch write to it
    torch.export.save(exported(encoder), program)
    (folder / ENCODER).write_bytes(program.getbuffer())
    try:
        plain_program(folder / ENCODER)
    except ValueError as error:
        raise InputError(
            f"PyTorch {torch.__version__} writes what services would refuse: {error}: use another"
        ) from None


def _write_domain(partial, dataset, number, model, faiss_name):
    domain, folder = dataset.domains[number], partial / f"domain-{number}"
    ids = item_ids(dataset, domain)
    text = ids.cast(pa.large_string())
    bytes_N = np.frombuffer(text.buffers()[2] or b"", np.uint8)
    offsets = np.frombuffer(text.buffers()[1], np.int64)[
        text.offset : text.offset + len(text) + 1
    ]
    tensors = {
        "bytes": bytes_N[offsets[0] : offsets[-1]].copy(),
        "offsets": offsets - offsets[0],
    }
    (folder / "ids.safetensors").write_bytes(save(tensors))
    if faiss_name:
        _write_index(folder, faiss_name)
    own_weight = 0.0
    if model.prediction is not None:
        own_weight = float(model.prediction.own_D[number])
        _write_encoder(
            folder, UserEncoder(model, (dataset.first_time, dataset.last_time), number)
        )
    facts = {
        "name": domain.name,
        "folder": folder.name,
        "items": domain.items,
        "id_type": str(ids.type),
    }
    return facts | {"own_weight": own_weight}


def _write_index(folder, name):
    import faiss

    items = np.load(folder / "items.npy", mmap_mode="r", allow_pickle=False)
    index = _faiss_index(name, items.shape[1])
    try:
        if not index.is_trained:
            spread = np.linspace(0, len(items) - 1, min(len(items), _BLOCK)).astype(
                np.int64
            )  # the first ones are no sample
            index.train(np.ascontiguousarray(items[spread], np.float32))
        for first in range(0, len(items), _BLOCK):
            index.add(np.ascontiguousarray(items[first : first + _BLOCK], np.float32))
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make {name!r} of {len(items)} items: {_reason(error)}: name another index"
        ) from None


def _faiss_index(name, width):
    try:
        import faiss
    except ImportError:
        raise InputError(
            "--faiss needs FAISS: pip install 'syncrec-trainer[index]', or leave --faiss out"
        ) from None
    try:
        return faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"--faiss {name}: FAISS knows no such index ({_reason(error)}): Flat and HNSW32 are two"
        ) from None


def _reason(error):
    return str(error).strip().splitlines()[-1][:200]


@contextlib.contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"{folder} cannot be written ({why}): give another --output or make room"
        ) from None
