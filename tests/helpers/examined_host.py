"""Started with one rank on each of two hosts: `launch/doctor.py`, with faults on the second one.

    python examined_host.py FAULTS WORD …

FAULTS, with commas between: data (its folder is not mounted), folder (the run's lies on its own disk),
shm (full), files (128 may be open), version (another torch), clock (an hour ahead: a fake one), none.
Each rank has a host name of its own, and mounts of its own.
"""

import ctypes
import functools
import os
import resource
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import launch.doctor
from trainer.distributed.process_exit import run_script
from trainer.doctor import examination

NEW_MOUNTS, NEW_NAMES = 0x20000, 0x4000000
PRIVATE = 0x4000 | 0x40000  # recursive, private
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A call of the C library, which has to succeed."""
    if getattr(LIBC, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}{arguments}")


def hide(folder, size="1m"):
    """Mounts an empty disk over a folder."""
    call(
        "mount",
        b"none",
        str(folder).encode(),
        b"tmpfs",
        0,
        f"size={size}".encode(),
    )


def fill(folder):
    """Writes until there is no room."""
    with open(Path(folder) / "full", "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return


def main():
    given = [word for word in sys.argv[1:] if "--local_rank" not in word]
    faults, words = given[0].split(","), given[1:]
    places = dict(word.split("=", 1) for word in words if "=" in word)
    rank = os.environ["RANK"]
    sys.argv = [launch.doctor.__file__, *words]
    call("unshare", NEW_MOUNTS | NEW_NAMES)
    call("mount", b"none", b"/", None, PRIVATE, None)
    socket.sethostname(f"machine{rank}")
    if rank == "1":
        if "data" in faults:
            hide(places["data"])
        if "folder" in faults:
            hide(Path(places["run"]).parent)
        if "shm" in faults:
            hide("/dev/shm")
            fill("/dev/shm")
        if "files" in faults:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, most))
        if "version" in faults:
            other = examination.list_versions() | {"torch": "0.9"}
            patch(examination, "list_versions", lambda: other)
        if "clock" in faults:
            clock = functools.partial(
                examination.measure_clocks, clock=lambda: time.time() + 3600
            )
            patch(examination, "measure_clocks", clock)
    launch.doctor.main()


def patch(module, name, value):
    """For as long as the process lives."""
    mock.patch.object(module, name, value).start()


if __name__ == "__main__":
    run_script(main)
