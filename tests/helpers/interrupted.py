"""Run by test_checkpoint.py: saves that end at every write call in turn, and what is on disk after each.

python -m tests.helpers.interrupted FOLDER

Each save is made by a forked process, which is killed, or told that the disk is full, at the n-th call that writes. This
process then goes on from what it left. FOLDER/found.json: {"cases": a list of Case, "disks": the same on disks that are too
small, or "no_disks": why they could not be had}.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save

import trainer.checkpoint.save
from tests.helpers.runs import (
    METRICS,
    SmallRun,
    best_of,
    everything,
    rank_of_one,
    same,
    train,
)
from trainer.checkpoint.layout import RunState, list_checkpoints
from trainer.checkpoint.load import find_newest, verify_checkpoint
from trainer.errors import InputError
from trainer.run_files import BEST

NEVER = 10**9
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Case:
    """One save: which call was its last, what became of it, and what is wrong with what it left."""

    scenario: str
    how: str  # "kill"; "torn": killed with the file half written; "full": OSError, the file half written
    call: str
    passed: bool = False  # the save said that it was made
    error: str = ""  # or what it raised
    step: int | None = None  # of the checkpoint that was found then
    wrong: str = ""


class Calls:
    """Counts a save's calls that write, and ends it at one of them."""

    def __init__(self, run, at, how):
        self.run, self.at, self.how, self.seen = str(run), at, how, []

    def audit(self, event, arguments):
        """Python tells every file operation before it makes it (sys.addaudithook)."""
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(path, int)
                or not flags & _WRITING
                or not str(path).startswith(self.run)
            ):
                return
            self.call("open", path, halves=[path] if flags & os.O_TRUNC else [])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.call(event.removeprefix("os."), arguments[0])

    def save_file(self, tensors, file, *metadata):
        """In safetensors' place: it writes a file with a name of its own first."""
        content = save(tensors, *metadata)
        self.call(
            "save_file",
            file,
            [file, Path(file).with_name(".tmp5vXkQ1")],
            content,
        )
        pause, self.audit = self.audit, lambda *_: None
        Path(file).write_bytes(content)
        self.audit = pause

    def fsync(self, handle):
        self.call("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        return _fsync(handle)

    def call(self, kind, path, halves=(), content=b'{"format_ver'):
        self.seen.append(f"{kind} {Path(path).name}" + (" *" if halves else ""))
        if len(self.seen) != self.at:
            return
        self.audit = lambda *_: None
        if self.how != "kill":
            for half in halves:
                Path(half).write_bytes(content[: len(content) // 2])
        if self.how != "full":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


_calls, _fsync = None, os.fsync


def install():
    """Has every call that writes go through `_calls`, if there is one."""
    checkpoint = trainer.checkpoint.save.save_file

    def through(real, name):
        return lambda *arguments: (getattr(_calls, name) if _calls else real)(
            *arguments
        )

    trainer.checkpoint.save.save_file = through(checkpoint, "save_file")
    os.fsync = through(_fsync, "fsync")
    sys.addaudithook(
        lambda event, arguments: _calls and _calls.audit(event, arguments)
    )


def _gathered_alone(parts, mine, **_):
    """Stands for all_gather and, with its arguments the other way round, for gather."""
    parts, mine = (parts, mine) if isinstance(parts, list) else (mine, parts)
    parts[0].copy_(mine)


def forked(work):
    """Calls work() in a process of its own; what it returned, or None where it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            # The threads that reduce are not there any more; a sum over one rank is what it was.
            dist.all_reduce = lambda *_, **__: None
            dist.broadcast = lambda *_, **__: None
            dist.all_gather = _gathered_alone
            dist.gather = _gathered_alone
            os.write(writing, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writing, json.dumps({"died": repr(error)}).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else None


def digest(folder):
    """Of the names of all that is in it, and of what is in the files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path}\0".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


class Scenario:
    """A run with good checkpoints, and one save more."""

    def __init__(self, name, folder, run, before, state):
        """before: RunStates of the checkpoints that are there, the last being the one to fall back on."""
        self.name, self.run, self.state, self.template = (
            name,
            run,
            state,
            folder / name,
        )
        self.expected = {}
        self.looked = {}  # what was found in a folder with such files
        trainer = run.trainer()
        for earlier in before:
            train(trainer, earlier.step - trainer.step)
            run.save(trainer, earlier)
            self.expected[earlier.step, earlier.validated] = everything(trainer)
        self.old = before[-1]
        self.trainer = train(trainer, state.step - trainer.step)
        self.expected[state.step, state.validated] = everything(trainer)
        shutil.copytree(run.folder, self.template)

    def save(self, at, how):
        """In a forked process: (calls, error)."""
        global _calls
        self.begin()
        calls = _calls = Calls(self.run.folder, at, how)
        error = ""
        try:
            writer = self.run.checkpoints(keep=1)
            writer.save(self.trainer.engine, self.trainer.table, self.state)
            writer.finish()
        except InputError as refusal:
            error = str(refusal)
        _calls = None
        return calls.seen, error

    def begin(self):
        shutil.rmtree(self.run.folder, ignore_errors=True)
        shutil.copytree(self.template, self.run.folder)

    def look_once(self, case):
        """Goes on from what is there, unless the same was there before: saves that end beside each other leave it."""
        there = digest(self.run.folder)
        if (there, case.how) not in self.looked:
            wrong = self.look(case)
            # After a full disk less is looked at.
            alike = ["full"] if case.how == "full" else ["kill", "torn", "full"]
            for how in alike:
                self.looked[there, how] = wrong, case.step
        wrong, case.step = self.looked[there, case.how]
        return wrong

    def look(self, case):
        """Goes on from what is there; what is wrong with it."""
        run, said = self.run, []
        folder, facts = find_newest(run.folder, run.ranks, said.append)
        if folder is None or said:
            return f"found {folder}, said {said}"
        state, case.step = facts["state"], facts["state"].step
        if state not in (self.old, self.state):
            return f"{folder} holds {state}"
        resumed = run.trainer(folder, state.step)
        if not same(
            everything(resumed), self.expected[state.step, state.validated]
        ):
            return f"{folder} does not hold what was saved"
        if (folder / "metrics.jsonl").read_text() != METRICS:
            return f"{folder} has other log lines"
        if (run.folder / BEST).exists():
            verify_checkpoint(
                run.folder
                / json.loads((run.folder / BEST).read_text())["folder"]
            )
        for other in list_checkpoints(
            run.folder
        ):  # what is half removed is none
            verify_checkpoint(other)
        # The run goes on, which for the old checkpoint is the very save that was interrupted.
        if state == self.old:
            then = self.state
        else:
            then = RunState(
                self.state.step + 1, self.state.step, self.state.best
            )
        train(resumed, then.step - state.step)
        writer = run.checkpoints(keep=1, last=state)
        writer.save(resumed.engine, resumed.table, then)
        writer.finish()
        entries = sorted(
            entry.name for entry in (run.folder / "checkpoints").iterdir()
        )
        whole = sorted(
            {
                list_checkpoints(run.folder)[0].name,
                Path(then.best["folder"]).name,
            }
        )
        if entries != whole or not any(
            name.startswith(f"step-{then.step:08d}") for name in whole
        ):
            return f"after a following save there are {entries}, not {whole}"
        folder, facts = find_newest(run.folder, run.ranks, said.append)
        if said or facts is None or facts["state"] != then:
            return (
                f"a following save gave {facts and facts['state']}, said {said}"
            )
        if case.how == "full":  # as it is after a kill
            return ""
        expected = self.expected.get(
            (then.step, then.validated)
        )  # none for the step after those that were made here
        if expected is not None and not same(
            everything(run.trainer(folder, then.step)), expected
        ):
            return "a following save does not hold what was saved"
        return ""

    def calls(self):
        """What a save that nothing happens to calls, in order."""
        calls, error = forked(lambda: self.save(NEVER, "kill"))
        assert not error, error
        return calls

    def cases(self, calls, first):
        """Ends a save at each of its calls from number `first` on."""
        for number, call in list(enumerate(calls, 1))[first - 1 :]:
            for how in ("kill", "torn", "full"):
                if how == "torn" and not call.endswith("*"):
                    continue  # there is no half of it
                case = Case(self.name, how, f"{number}: {call}")
                self._make(
                    case, forked(lambda at=number, how=how: self.save(at, how))
                )
                yield case

    def _make(self, case, told):
        if isinstance(told, dict):
            case.wrong = told["died"]
            return
        case.passed, case.error = (
            (not told[1], told[1]) if told else (False, "")
        )
        left = (
            [
                entry.name
                for entry in (self.run.folder / "checkpoints").glob("*.partial")
            ]
            if told
            else []
        )
        try:
            case.wrong = f"left {left}" if left else self.look_once(case)
        except Exception as error:
            case.wrong = repr(error)


def on_disks(scenario, folder):
    """The save on disks with ever more room, until it fits: a list of (room in bytes, error, step found, as it was saved)."""
    libc = ctypes.CDLL(None, use_errno=True)
    needed = sum(file.stat().st_size for file in scenario.template.rglob("*"))
    disk = scenario.run.folder

    def mounted(size):
        if libc.unshare(
            0x00020000
        ):  # CLONE_NEWNS: what is mounted is this process's alone, and goes with it
            return None
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        private, option = 1 << 18 | 1 << 14, f"size={size}".encode()
        if libc.mount(b"none", b"/", None, private, None) or libc.mount(
            b"tmpfs", bytes(disk), b"tmpfs", 0, option
        ):
            return None
        try:
            shutil.copytree(scenario.template, disk, dirs_exist_ok=True)
        except (OSError, shutil.Error):
            return "too small"
        error = ""
        try:
            writer = scenario.run.checkpoints(keep=1)
            writer.save(
                scenario.trainer.engine, scenario.trainer.table, scenario.state
            )
            writer.finish()
        except InputError as refusal:
            error = str(refusal)
        said = []
        _, facts = find_newest(disk, scenario.run.ranks, said.append)
        left = sorted(
            entry.name
            for entry in (disk / "checkpoints").iterdir()
            if entry.suffix
        )
        return [
            size,
            error,
            asdict(facts["state"]) if facts else None,
            said + left,
        ]

    found = []
    for size in range(needed // 4096 * 4096, 100 * needed, 4096):
        told = forked(lambda size=size: mounted(size))
        if told is None:
            return "mounting a tmpfs is not allowed here"
        if isinstance(told, dict):
            return found + [[size, told["died"], None, []]]
        if told != "too small":
            found.append(told)
            if not told[1]:
                return found
    raise AssertionError("no disk was large enough")


def main(folder):
    """All cases, in a process group of this process alone."""
    install()
    found = {"cases": [], "disks": []}
    with rank_of_one() as ranks:
        run = SmallRun(folder, ranks)
        run.folder.mkdir()
        (run.folder / "metrics.jsonl").write_text(METRICS)
        further = Scenario(
            "a further step",
            folder,
            run,
            [RunState(1, 1, best_of(1)), RunState(2, 1, best_of(1), 0)],
            RunState(3, 3, best_of(3)),
        )
        shutil.rmtree(run.folder / "checkpoints")
        (run.folder / BEST).unlink()
        again = Scenario(
            "the same step",
            folder,
            run,
            [RunState(3)],
            RunState(3, 3, best_of(3)),
        )
        calls, others = further.calls(), again.calls()
        # Until a folder is renamed they write the same, under another name: looked at once.
        alike = next(
            number
            for number, call in enumerate(others, 1)
            if call.startswith("rename step-")
        )
        for scenario, its_calls, first in (
            (further, calls, 1),
            (again, others, alike),
        ):
            found["cases"] += [
                asdict(case) for case in scenario.cases(its_calls, first)
            ]
        disks = on_disks(further, folder)
        found |= (
            {"no_disks": disks} if isinstance(disks, str) else {"disks": disks}
        )
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(
        0
    )  # without Python's teardown, as trainer.distributed.process_exit has it
