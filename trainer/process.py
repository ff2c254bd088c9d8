"""How a script that joins a process group begins and ends as a process."""

import multiprocessing
import os
import sys
import traceback


def run_script(main):
    """Calls main() and ends this process with its status: 0, what it left with (`sys.exit`), or 1 with the trace.

    Python's own teardown is left out: a process that goes through it while threads of gloo are at work (DeepSpeed and TorchRec
    keep the group alive) is aborted now and then, after all is done. A failure does not wait for anything either: the launcher
    takes the other ranks down when it sees this one gone.
    """
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for child in multiprocessing.active_children():  # loaders of batches that nobody waits for
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
