"""Drift: how far item vectors moved between two exported models."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file

from trainer.errors import InputError
from trainer.retraining.day import read_json


def measure_drift(
    before: Path,
    after: Path,
) -> dict[str, dict[str, Any]]:
    """By domain, the cosines between the vectors that an item has in two exports.

    Each domain has: items (that both exports know), mean and p5 (of the cosines). A domain
    without common items, or with another width, is left out.

    Raises InputError where a schema names a folder that is no domain's.
    """
    drift = {}
    folders_before = _domain_folders(before)
    for name, folder in _domain_folders(after).items():
        if name not in folders_before:
            continue
        cosines = _cosines(folders_before[name], folder)
        if cosines is None:
            continue
        drift[name] = {
            "items": len(cosines),
            "mean": float(cosines.mean()),
            "p5": float(np.quantile(cosines, 0.05)),
        }
    return drift


def _cosines(
    before: Path,
    after: Path,
) -> np.ndarray | None:
    """Cosines of the items that two folders of a domain have in common, float64 (items,).

    None without any, and where the vectors' widths differ.
    """
    matches = pc.index_in(_read_ids(after), value_set=_read_ids(before))
    place_N = matches.to_numpy(zero_copy_only=False)
    is_common_N = ~np.isnan(place_N.astype(np.float64))
    new_places = np.flatnonzero(is_common_N)
    old_places = place_N[new_places].astype(np.int64)
    old = np.load(
        before / "items.npy",
        mmap_mode="r",
        allow_pickle=False,
    )
    new = np.load(
        after / "items.npy",
        mmap_mode="r",
        allow_pickle=False,
    )
    if not len(new_places):
        return None
    if old.shape[1] != new.shape[1]:
        return None
    old_vectors = np.asarray(old[old_places], np.float64)
    new_vectors = np.asarray(new[new_places], np.float64)
    old_lengths = np.linalg.norm(old_vectors, axis=1)
    new_lengths = np.linalg.norm(new_vectors, axis=1)
    lengths = np.maximum(old_lengths * new_lengths, 1e-30)
    return (old_vectors * new_vectors).sum(1) / lengths


def _domain_folders(model: Path) -> dict[str, Path]:
    """The folders of an export's domains, by the domains' names."""
    schema = model / "schema.json"
    folders = {}
    for domain in read_json(schema)["domains"]:
        folder = domain["folder"]
        if not re.fullmatch(r"domain-\d+", folder):
            raise InputError(f"{schema}: {folder!r} is no domain's folder")
        folders[domain["name"]] = model / folder
    return folders


def _read_ids(folder: Path) -> pa.Array:
    """The raw ids of an export's domain as text."""
    stored = load_file(folder / "ids.safetensors")
    text = stored["bytes"].tobytes()
    offsets = stored["offsets"]
    return pa.LargeStringArray.from_buffers(
        len(offsets) - 1,
        pa.py_buffer(offsets.tobytes()),
        pa.py_buffer(text),
    )
