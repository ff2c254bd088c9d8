"""The former module of `new_folder`, which is in trainer.files.staged."""

from trainer.files.staged import new_folder

__all__ = ["new_folder"]
