"""Exports a finished run's best model for inference with PyTorch, NumPy and safetensors alone.

    schema.json              sizes, domains, types, the best step, every file's size and sha256
    encoder.pt2              the user encoder, a torch.export program (syncrec/export.py)
    domain-N/items.npy       the N-th domain's item vectors (items, r), to be memory-mapped
    domain-N/ids.safetensors their raw ids as UTF-8: bytes uint8, offsets int64 (items + 1)
    domain-N/index.faiss     where asked for: a FAISS index of the vectors, by inner product
    domain-N/offsets.npy     with the recency term: what the recent past adds to each item's score
    domain-N/counts.npy      the counts that it comes from (trainer/serving/item_offsets.py)
    example.py               loads all this and recommends

A user's score of an item is the dot product of the encoder's output and the item's vector. With the
term it is that of (a · output, 1) and (vector, offset).
"""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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
from trainer.data.format.dataset import Dataset, Domain
from trainer.data.format.vocabulary import read_item_ids
from trainer.data.loading.day_counts import count_recent
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.evaluation.recency.stored import open_recency_term
from trainer.evaluation.recency.term import RecencyTerm
from trainer.files.atomic import move_folder
from trainer.files.progress import Stages
from trainer.serving.example import plain_program
from trainer.serving.faiss_index import make_index, write_index
from trainer.serving.item_offsets import (
    RECENCY,
    CountMoment,
    OffsetFormula,
    write_offsets,
)
from trainer.serving.schema import describe_files, write_schema

# 2: the encoder takes times; 3: items have offsets, which an export without the term does not
FORMAT_VERSION = 2
_VERSION_WITH_OFFSETS = 3
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
        make_index(config.faiss, 8)


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
        with_term = config.recency_term
        if with_term is None:
            with_term = run_config.evaluation.recency_term
        term = None
        if with_term:
            counts = count_recent(dataset, ranks, run_config.stream)
            term = open_recency_term(trained, counts)
        export = _Export(trained, config, partial, term)
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
    term: RecencyTerm | None

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
        write_schema(self.folder, schema)
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
        recency = {}
        if self.term is not None:
            recency[RECENCY] = self._write_offsets(number, self.term)
        if self.config.faiss:
            write_index(folder, self.config.faiss)
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
            **recency,
        }

    def _write_offsets(self, number: int, term: RecencyTerm) -> dict[str, Any]:
        """Writes a domain's counts as of the day after the dataset's last; returns a and w."""
        domain = self.dataset.domains[number]
        rows_N = domain.rows
        after_last = term.features.counts.days.count
        counts_NJ = term.features.counts_before(
            rows_N, np.full(len(rows_N), after_last)
        )
        record = term.to_record(self.dataset)
        entry = record["domains"][domain.name]
        formula = OffsetFormula.from_record(record)
        offset_N = formula.offsets(counts_NJ, entry["weights"])
        folder = self.folder / f"domain-{number}"
        write_offsets(folder, counts_NJ, offset_N)
        return entry

    def _describe_term(self) -> dict[str, Any]:
        """What the schema says of the term; nothing without one."""
        if self.term is None:
            return {"format_version": FORMAT_VERSION}
        recency = self.term.to_record(self.dataset)
        del recency["domains"]
        moment = CountMoment.of(self.dataset)
        return {
            "format_version": _VERSION_WITH_OFFSETS,
            RECENCY: recency | moment.to_record(),
            "faiss": self.config.faiss,
        }

    def _describe(self, domains: list[dict[str, Any]]) -> dict[str, Any]:
        """The schema of the files that are there."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        names = sorted(str(path.relative_to(self.folder)) for path in paths)
        files = describe_files(self.folder, names)
        model_config = self.served.config.model
        times = self.dataset.log_times
        return {
            **self._describe_term(),
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
