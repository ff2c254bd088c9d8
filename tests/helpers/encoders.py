"""Exported encoders, which take PyTorch seconds to write and to read."""

import contextlib
import functools
from pathlib import Path
from unittest import mock

import torch


@contextlib.contextmanager
def load_once():
    """Within it PyTorch reads a program of the same bytes once, and makes a module of it once.

    Every reader before PyTorch's own sees the file as ever.
    """
    load, programs = torch.export.load, {}

    def load_known(file, **options):
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        if data not in programs:
            if hasattr(file, "seek"):
                file.seek(0)
            program = load(file, **options)
            program.module = functools.cache(program.module)
            programs[data] = program
        return programs[data]

    with mock.patch.object(torch.export, "load", load_known):
        yield
