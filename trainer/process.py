"""How a script that joins a process group begins and ends as a process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

from trainer.errors import InputError, NotFinite, Stopped

_UNDER_SUPERVISION = "SYNCREC_UNDER_SUPERVISION"
_NOT_AGAIN = {0, InputError.status, NotFinite.status, Stopped.status}  # the same would come of it


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
        print(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed:", file=sys.stderr)
        traceback.print_exc()
        status = 1
    for child in multiprocessing.active_children():  # loaders of batches that nobody waits for
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def supervise(max_restarts, pause=2.0):
    """Runs this very command as a child, and again where it fails, up to `max_restarts` times; ends this process with the last
    child's status. In the child it returns.

    Under a launcher each rank's process does so for itself: where one rank dies, the others lose it and end too, and all meet
    again in the next attempt at the same address. pause: seconds in which the last of the others ends.
    """
    if os.environ.get(_UNDER_SUPERVISION):
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("--max-restarts: torchrun restarts by itself, give it to torchrun (before the script's name)")
    rank = os.environ.get("RANK", "0")
    child, stopped = None, False

    def pass_on(number, frame):
        nonlocal stopped
        stopped = True
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]  # its own attempts are to be gone on with
    for attempt in range(max_restarts + 1):
        given = sys.argv[1:] if attempt == 0 else arguments
        child = subprocess.Popen([sys.executable, sys.argv[0], *given], env=os.environ | {_UNDER_SUPERVISION: "1"})
        if stopped:  # asked between two lines
            child.terminate()
        status = child.wait()
        if status in _NOT_AGAIN or stopped or attempt == max_restarts:
            break
        how = f"signal {-status}" if status < 0 else f"status {status}"
        again = f"restart {attempt + 1} of {max_restarts}"
        print(f"rank {rank}: ended with {how}; {again} in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        if stopped:
            break
    sys.exit(status if status >= 0 else 128 - status)
