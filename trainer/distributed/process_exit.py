"""How a script that joins a process group begins and ends as a process."""

import multiprocessing
import os
import signal
import sys
import traceback

from trainer.distributed.launchers import sign

INTERRUPTED = 128 + signal.SIGINT


def run_script(main):
    """Calls main() and ends this process with its status: 0, what it left with (`sys.exit`), or 1
    with the trace; 130 where it was interrupted (SIGINT).

    Python's own teardown is left out: a process that goes through it while threads of gloo are at
    work (DeepSpeed and TorchRec keep the group alive) is aborted now and then, after all is done. A
    failure does not wait for anything either: the launcher takes the other ranks down when it sees
    this one gone.
    """
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{sign()}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BaseException:
        print(f"{sign()} failed:", file=sys.stderr)
        traceback.print_exc()
        status = 1
    end_process(status)


def end_process(status: int) -> None:
    """Ends this process where it is, in any thread, and with it the loaders of batches that nobody
    waits for."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
