"""Exports a finished run's best model for inference with PyTorch, NumPy and safetensors alone.

    schema.json              sizes, domains, types, the best step, every file's size and sha256
    encoder.pt2              the user encoder, a torch.export program (syncrec/export.py)
    domain-N/items.npy       the N-th domain's item vectors (items, r), to be memory-mapped
    domain-N/ids.safetensors their raw ids as UTF-8: bytes uint8, offsets int64 (items + 1)
    domain-N/index.faiss     where asked for: a FAISS index of the vectors, by inner product
    example.py               loads all this and recommends

A user's score of an item is the dot product of the encoder's output and the item's vector.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save

from syncrec.export import UserEncoder, check_exportable, export_program
from syncrec.model import SyNCRec
from trainer.checkpoint.best_model import (
    TrainedModel,
    load_trained_model,
    open_run,
)
from trainer.config.serving import ExportConfig
from trainer.data.format.dataset import Dataset, Domain, File
from trainer.data.format.vocabulary import read_item_ids
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.files.atomic import move_folder
from trainer.files.progress import Stages
from trainer.serving.example import plain_program

if TYPE_CHECKING:
    import faiss

FORMAT_VERSION = 2  # 2: the encoder takes times
SCHEMA = "schema.json"
ENCODER = "encoder.pt2"
_DTYPES = {"fp32": np.float32, "fp16": np.float16}
_BLOCK = 65536  # item vectors brought to the first rank at once
_EXAMPLE = Path(__file__).with_name("example.py")

_ENCODER_INTERFACE = {
    "inputs": {
        "items": "float32 (users, items, width): vectors of the newest items, oldest first; "
        "items: 1 to max_length",
        "lengths": "int64 (users,): how many of them are the user's; 0 for a user without a "
        "history",
        "times": "float64 (users, items): when they were, in the logs' unit (dates: "
        "microseconds since 1970)",
        "now": "float64 (users,): for when is asked; later than last_time is as last_time",
    },
    "output": "float32 (users, width): a user's vector; its dot product with an item's is the "
    "score",
    "own": "a domain's own encoder is given its items alone; own_weight of a user's vector for "
    "the domain is its",
}


def check_faiss(config: ExportConfig) -> None:
    """Raises InputError where an index is wanted, and FAISS is missing or has no such index."""
    if config.faiss:
        _make_index(config.faiss, 8)


def export_run(
    run: str | Path,
    output: str | Path,
    ranks: Ranks,
    config: ExportConfig,
    data: str | Path | None = None,
    trained: TrainedModel | None = None,
) -> dict[str, Any]:
    """Writes the folder `output` and returns its schema. Called on all ranks; the first writes.

    data: the run's dataset where it has moved. trained: the model, where
    it has been read already; the model is on the CPU afterwards.

    Raises InputError for whatever is wrong with the run, and where `output` is there already or
    cannot be written. There is no new output at all then.
    """
    check_faiss(config)
    output = Path(output)
    partial = output.with_name(f".{output.name}.partial")
    run_config, dataset = open_run(
        run,
        data,
        of_all_domains=True,
        ranks=ranks,
    )
    try:
        check_exportable(run_config.model)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from None
    run_on_first_rank(lambda: _begin(output, partial), ranks.first)
    try:
        if trained is None:
            trained = load_trained_model(run, run_config, dataset, ranks)
        export = _Export(trained, config, partial)
        with Stages(ranks.first) as stages:
            export.write_items(stages)
            with stages("exporting the encoder"):
                return run_on_first_rank(
                    lambda: _finish(export, output), ranks.first
                )
    except BaseException:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _begin(
    output: Path,
    partial: Path,
) -> None:
    """Makes the partial folder. Raises InputError where the output is there already."""
    if output.exists():
        raise InputError(
            f"output {output} is there already: name another folder or remove it"
        )
    with _disk_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def _finish(
    export: "_Export",
    output: Path,
) -> dict[str, Any]:
    """Writes all but the items, and makes the folder the output. Called on the first rank."""
    with _disk_errors(export.folder):
        schema = export.write_files()
        move_folder(export.folder, output)
    return schema


@dataclass(frozen=True)
class _Export:
    """A model on its way into a folder, which gets its name once it is whole."""

    served: TrainedModel
    config: ExportConfig
    folder: Path

    @property
    def dataset(self) -> Dataset:
        return self.served.dataset

    @property
    def _time_span(self) -> tuple[float, float]:
        return self.dataset.first_time, self.dataset.last_time

    def write_items(self, stages: Stages) -> None:
        """Writes every domain's item vectors. Called on all ranks."""
        total = sum(domain.items for domain in self.dataset.domains)
        with stages("exporting item vectors", total=total) as advance:
            for number, domain in enumerate(self.dataset.domains):
                folder = self.folder / f"domain-{number}"
                dtype = np.dtype(_DTYPES[self.config.dtype])
                _write_items(
                    folder,
                    self.served,
                    domain,
                    dtype,
                    advance,
                )

    def write_files(self) -> dict[str, Any]:
        """Writes encoders, ids, indices, the example and the schema. Returns the schema."""
        model = self.served.model.cpu()
        domains = []
        for number in range(len(self.dataset.domains)):
            domains.append(self._write_domain(number, model))
        _write_encoder(self.folder, UserEncoder(model, self._time_span))
        shutil.copyfile(_EXAMPLE, self.folder / "example.py")
        schema = self._describe(domains)
        text = (
            json.dumps(
                schema,
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )
        (self.folder / SCHEMA).write_text(text, encoding="utf-8")
        return schema

    def _write_domain(
        self,
        number: int,
        model: SyNCRec,
    ) -> dict[str, Any]:
        """Writes a domain's files beside its vectors; returns its entry in the schema."""
        domain = self.dataset.domains[number]
        folder = self.folder / f"domain-{number}"
        ids = read_item_ids(self.dataset, domain)
        _write_ids(folder, ids)
        if self.config.faiss:
            _write_index(folder, self.config.faiss)
        own_weight = 0.0
        if model.gap is not None and model.config.predicts_by_both:
            own_weight = float(model.gap.single_weight_D[number])
            _write_encoder(
                folder,
                UserEncoder(
                    model,
                    self._time_span,
                    number,
                ),
            )
        return {
            "name": domain.name,
            "folder": folder.name,
            "items": domain.items,
            "id_type": str(ids.type),
            "own_weight": own_weight,
        }

    def _describe(self, domains: list[dict[str, Any]]) -> dict[str, Any]:
        """The schema of the files that are there."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        files = {}
        for name in sorted(
            str(path.relative_to(self.folder)) for path in paths
        ):
            file = File.of(self.folder, name)
            files[name] = {"bytes": file.bytes, "sha256": file.sha256}
        model_config = self.served.config.model
        times = self.dataset.log_times
        return {
            "format_version": FORMAT_VERSION,
            "width": model_config.dim,
            "max_length": model_config.max_length,
            "item_dtype": self.config.dtype,
            "first_time": self.dataset.first_time,
            "last_time": self.dataset.last_time,
            "time_kind": times.kind,
            "time_unit": times.unit,
            "domains": domains,
            "encoder": _ENCODER_INTERFACE,
            "best_step": self.served.checkpoint["step"],
            "dataset": self.dataset.fingerprint,
            "torch": metadata.version("torch"),
            "files": files,
        }


@torch.no_grad()
def _write_items(
    folder: Path,
    served: TrainedModel,
    domain: Domain,
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> None:
    """Writes a domain's vectors, a block at a time: no rank ever holds more of the others' rows.

    Appended, not mapped: a full disk kills a process that writes to a mapped file.
    """
    ranks = served.ranks
    file = folder / "items.npy"
    shape = (domain.items, served.table.dim)
    end = domain.start + domain.items
    for first in range(domain.start, end, _BLOCK):
        last = min(first + _BLOCK, end)
        rows = torch.zeros(0, dtype=torch.int64)
        if ranks.first:
            rows = torch.arange(first, last)
        vectors = served.table(rows).cpu().numpy()

        def write() -> None:
            with _disk_errors(folder):
                folder.mkdir(exist_ok=True)
                _append_items(file, vectors, shape, dtype)  # noqa: B023

        run_on_first_rank(write, ranks.first)
        advance(last - first)


def _append_items(
    path: Path,
    vectors: np.ndarray,
    shape: tuple[int, int],
    dtype: np.dtype,
) -> None:
    """Appends vectors to a NumPy file; shape: of the whole file."""
    with open(path, "ab") as file:
        if file.tell() == 0:
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(vectors, dtype).data)


def _write_ids(
    folder: Path,
    ids: pa.Array,
) -> None:
    """Writes a domain's raw ids as UTF-8, end to end."""
    text = ids.cast(pa.large_string())
    _, offset_buffer, byte_buffer = text.buffers()
    bytes_N = np.frombuffer(byte_buffer or b"", np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int64)
    offsets = offsets[text.offset : text.offset + len(text) + 1]
    tensors = {
        "bytes": bytes_N[offsets[0] : offsets[-1]].copy(),
        "offsets": offsets - offsets[0],
    }
    (folder / "ids.safetensors").write_bytes(save(tensors))


def _write_encoder(
    folder: Path,
    encoder: UserEncoder,
) -> None:
    """Writes an encoder. Raises InputError for one that services would not load."""
    # A full disk ends a process that lets PyTorch write to it.
    program = io.BytesIO()
    torch.export.save(export_program(encoder), program)
    (folder / ENCODER).write_bytes(program.getbuffer())
    try:
        plain_program(folder / ENCODER)
    except ValueError as error:
        raise InputError(
            f"PyTorch {torch.__version__} writes what services would refuse: {error}: "
            "use another"
        ) from None


def _write_index(
    folder: Path,
    name: str,
) -> None:
    """Writes a FAISS index of a domain's vectors. Raises InputError."""
    import faiss

    items = np.load(
        folder / "items.npy",
        mmap_mode="r",
        allow_pickle=False,
    )
    index = _make_index(name, items.shape[1])
    try:
        if not index.is_trained:
            # Evenly spread: the first items are no sample of all.
            places = np.linspace(
                0,
                len(items) - 1,
                min(len(items), _BLOCK),
            )
            sample = items[places.astype(np.int64)]
            index.train(np.ascontiguousarray(sample, np.float32))
        for first in range(0, len(items), _BLOCK):
            block = items[first : first + _BLOCK]
            index.add(np.ascontiguousarray(block, np.float32))
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make {name!r} of {len(items)} items: {_last_line(error)}: "
            "name another index"
        ) from None


def _make_index(
    name: str,
    width: int,
) -> "faiss.Index":
    """An empty FAISS index, by inner product. Raises InputError."""
    try:
        import faiss
    except ImportError:
        raise InputError(
            "--faiss needs FAISS: pip install 'syncrec-trainer[index]', or leave "
            "--faiss out"
        ) from None
    try:
        return faiss.index_factory(
            width,
            name,
            faiss.METRIC_INNER_PRODUCT,
        )
    except RuntimeError as error:
        raise InputError(
            f"--faiss {name}: FAISS knows no such index ({_last_line(error)}): Flat and "
            "HNSW32 are two"
        ) from None


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1][:200]


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the disk has against it into an InputError."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"{folder} cannot be written ({why}): give another --output or make room"
        ) from None
