"""A process that has imported the whole stack, and forks a rank whenever a test asks for one.

    python -m tests.helpers.rank_server SOCKET

Importing PyTorch, TorchRec, DeepSpeed and FBGEMM takes seconds of a core in each process. A forked
rank has them at once. It is a process of its own in all else: its environment, arguments, output,
process group, signals and memory. A request is a line of JSON; the answers are lines with the pid and,
when the rank has ended, its status. The server ends when the connection that says so is gone. So does
a rank that is tied to who asked for it (tests/helpers/forked_python.py), and with it its input and
output come along.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback

SUPERVISOR = "SYNCREC_SUPERVISOR"  # trainer/distributed/supervisor.py
# What a rank may use; imported here, once.
STACK = (
    "torch",
    "deepspeed",
    "torchrec",
    "trainer.training.loop",
    "trainer.evaluation.evaluate_run",
    "trainer.serving.recommend",
    "trainer.serving.export",
    "trainer.retraining.publish",
    "trainer.data.prepare.pipeline",
    # What they import where they first need it.
    "jinja2",
    "plotly.graph_objects",
    "plotly.io",
    "pyarrow.dataset",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "trainer.config.command_line",
    "trainer.distributed.supervisor",
    "trainer.reporting.run_report",
    "trainer.study.runner",
)


def main(path: str) -> None:
    """Serves until the first connection is closed."""
    for name in STACK:
        __import__(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    owner, _ = listener.accept()
    owner.sendall(b"ready\n")
    waiting: dict[int, socket.socket] = {}
    tied: dict[socket.socket, int] = {}
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        tied = {each: pid for each, pid in tied.items() if pid in waiting}
        listening = [listener, owner, wake, *tied]
        readable, _, _ = select.select(listening, [], [], 1.0)
        if wake in readable:
            os.read(wake, 4096)
        for connection in tied.keys() & set(readable):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tied.pop(connection), signal.SIGKILL)
        report_ended(waiting)
        if owner in readable:
            break
        if listener in readable:
            connection, _ = listener.accept()
            line, streams = read_line(connection)
            request = json.loads(line)
            keep = [listener, owner, connection, *waiting.values()]
            pid = fork_rank(request, streams, keep, (wake, woken))
            for stream in streams:
                os.close(stream)
            waiting[pid] = connection
            if request.get("tied"):
                tied[connection] = pid
            with contextlib.suppress(OSError):
                connection.sendall(f"{pid}\n".encode())
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)


def read_line(connection: socket.socket) -> tuple[bytes, list[int]]:
    """What comes until the line ends, and the files that come along."""
    line = b""
    streams: list[int] = []
    while not line.endswith(b"\n"):
        more, files, _, _ = socket.recv_fds(connection, 65536, 3)
        if not more:
            raise ConnectionError("a request has no end")
        line += more
        streams += files
    return line, streams


def report_ended(waiting: dict[int, socket.socket]) -> None:
    """Tells who waits for a rank that it has ended, and how."""
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = waiting.pop(pid, None)
        if connection is None:
            continue
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):  # nobody waits any more
            connection.sendall(f"{code}\n".encode())
        connection.close()


def fork_rank(
    request: dict, streams: list[int], sockets: list, pipe: tuple[int, int]
) -> int:
    """The pid of a new process that runs what is asked for.

    streams: its input, output and errors, where they are not files that the request names.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for inherited in sockets:
            inherited.close()
        for number in pipe:
            os.close(number)
        os.setsid()
        if streams:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            open_streams()
        else:
            redirect(request["stdout"], request["stderr"])
        status = run_rank(request)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def run_rank(request: dict) -> int:
    """Runs the script or module as Python would, and gives its exit status."""
    os.environ.clear()
    os.environ.update(request["environment"])
    if SUPERVISOR in os.environ:  # with whom it is to end
        os.environ[SUPERVISOR] = str(os.getppid())
    # What it starts by `sys.executable`, a launcher its ranks.
    sys.executable = os.environ.get("FORKED_PYTHON", sys.executable)
    os.chdir(request["folder"])
    if "WITHOUT_REPORT" in os.environ:
        leave_out_report()
    if "IN_THIS_PROCESS" in os.environ:
        measure_in_this_process()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    target, *arguments = request["command"]
    sys.argv = [target, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    if request["module"]:
        sys.orig_argv.insert(1, "-m")
    status: object = 0
    try:
        if request["module"]:
            sys.path.insert(0, request["folder"])
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
            runpy.run_path(target, run_name="__main__")
    except SystemExit as left:
        status = left.code
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    return int(status or 0)


def open_streams() -> None:
    """Has Python take the files that it has now for its input and output, be they pipes or terminals."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = (
        sys.stdin,
        sys.stdout,
        sys.stderr,
    )


def leave_out_report() -> None:
    """A run's page takes longer to draw than a few steps take."""
    import trainer.reporting.run_report

    trainer.reporting.run_report.write_report = lambda run, has_ended=False: (
        f"{run}: none"
    )


def measure_in_this_process() -> None:
    """A benchmark's cases take no processes of their own, which would import the stack."""
    from benchmarks import suite
    from tests.helpers.alone import in_this_process

    suite.in_own_process = in_this_process


def redirect(stdout: str, stderr: str) -> None:
    """Output goes to files, input comes from nowhere."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name in ((1, stdout), (2, stderr)):
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    main(sys.argv[1])
