"""An output folder that is there whole or not at all."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import InputError
from trainer.files.atomic import move_folder


@contextmanager
def new_folder(output):
    """Yields an empty folder to write into, beside the output, and a scratch folder; renames the first at the end.

    On any failure both are removed. Raises InputError: the output already holds something, or cannot be written.
    """
    output = Path(output)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(
                f"output {output} already holds something: name another folder or remove it"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}."
        ) as work:
            folder, scratch = Path(work) / "folder", Path(work) / "scratch"
            folder.mkdir()
            scratch.mkdir()
            yield folder, scratch
            move_folder(folder, output)
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error}") from None
