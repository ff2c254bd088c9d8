"""Stands for Python where a launcher or a command starts processes that import the whole stack.

    python -S -E forked_python.py SOCKET [-u] [-m MODULE | SCRIPT] ARGUMENT …

The server of ranks forks what is asked for, with this process's environment, folder, input and output.
This process passes signals on, and ends as the other does. Imports little: it is started often.
"""

import contextlib
import json
import os
import signal
import socket
import sys

PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGCONT,
)


def main(path, words):
    """Asks for the process, and waits for its end."""
    while words and words[0] == "-u":
        words = words[1:]
    module = words[0] == "-m"
    request = {
        "command": words[1:] if module else words,
        "module": module,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "tied": True,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    line = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [line], [0, 1, 2])
    connection.sendall(line[sent:])
    answers = connection.makefile("r")
    pid = int(answers.readline())

    def pass_on(number, frame):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    status = int(answers.readline() or "-9")
    if status < 0:
        with contextlib.suppress(OSError):  # of SIGKILL there is no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
