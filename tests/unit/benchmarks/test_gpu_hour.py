"""Each stage's command is one that the code takes; a stage that fails or hangs ends no other; what is known is on disk."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_hour, gpu_stages, suite
from benchmarks.gpu_stages import Places, Stage, list_stages
from tests.helpers.rank_processes import cpu_environment, forked_python
from trainer.config.load import load_config
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs

ROOT = Path(__file__).resolve().parents[3]
# These and no others of the tiny form run with the other tests: what each takes is in its place.
QUICK = ("environment", "train", "resume", "evaluate", "steps", "profile")


def places(folder, data=None):
    return Places(folder / "output", folder / "work", data)


def every_stage():
    """(tiny or full, name) of all stages."""
    for tiny in (False, True):
        for stage in list_stages(places(ROOT), tiny):
            yield pytest.param(
                tiny, stage.name, id=f"{stage.name}{'-tiny' * tiny}"
            )


def import_programs():
    """{file: module} of the stages' programs."""
    modules = {}
    for stage in list_stages(places(ROOT)):
        program = stage.command[1]
        if program.endswith(".py"):
            name = program.removesuffix(".py").replace("/", ".")
            modules[program] = importlib.import_module(name)
    return modules


# When this file is imported, not in a test: DeepSpeed starts a process when it is.
MODULES = import_programs()


@pytest.mark.parametrize(("tiny", "name"), list(every_stage()))
def test_a_command_is_one_that_the_code_takes(tiny, name, tmp_path):
    """Options, settings and files are there under the names that the command has for them."""
    (tmp_path / "output").mkdir()
    (stage,) = [
        stage
        for stage in list_stages(places(tmp_path), tiny)
        if stage.name == name
    ]
    python, program, *words = stage.command
    assert python == sys.executable
    if program == "-m":
        assert words.pop(0) == "pytest"
        files = [word for word in words if word.startswith("tests/")]
        assert files
        for file in files:
            assert (ROOT / file).exists(), file
        return
    assert (ROOT / program).is_file()
    module = MODULES[program]
    if program.startswith("benchmarks/"):
        own = Path(program).stem
        _, options = suite.settings(own, module.Settings, words)
        assert options.json is not None
        return
    options = module.parse(words)
    if program == "launch/train.py":
        load_config(options.config, options.settings)


def test_no_two_stages_write_the_same_file_and_what_one_needs_comes_before_it():
    stages = list_stages(places(ROOT))
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:number])
        assert 0 < stage.share <= 0.3
        assert stage.least <= stage.share * gpu_hour.Options().budget
    records = [word for stage in stages for word in stage.command]
    records = [word for word in records if word.endswith(".json")]
    assert len(set(records)) == len(records) > 10


def shell(name, script, **more):
    """A stage that is a line of shell."""
    given = {"share": 0.5, "least": 0.0, "headline": gpu_stages.last_line}
    return Stage(name, "", ("sh", "-c", script), **(given | more))


def drive(folder, *stages, budget=60.0):
    """The driver after its run, and the lines that it has written."""
    options = gpu_hour.Options(output=str(folder), budget=budget)
    driver = gpu_hour.Driver(
        stages, Places(folder, folder / "work", None), options
    )
    driver.run()
    return driver, lines_of(folder)


def lines_of(folder):
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.ranks
def test_a_stage_that_fails_is_killed_or_hangs_ends_no_other(tmp_path, capsys):
    stages = [
        shell("well", "echo so it is"),
        shell("failing", "echo no; exit 3"),
        shell("killed", "kill -9 $$"),
        # It has another process, and does not end when it is asked to.
        shell("hanging", "trap '' TERM; sleep 600 & sleep 600", share=0.01),
        replace(shell("missing", ""), command=("/nowhere/at/all",)),
        shell("needing", "echo never", needs=("failing",)),
        shell("long", "echo never", least=61.0),
        shell("last", "exec echo the end"),
    ]
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(gpu_hour, "_GRACE", 0.2)
        driver, lines = drive(tmp_path, *stages)
    states = {name: result.state for name, result in driver.results.items()}
    assert states == {
        "well": "ok",
        "failing": "failed",
        "killed": "failed",
        "hanging": "over its limit",
        "missing": "failed",
        "needing": "not begun",
        "long": "not begun",
        "last": "ok",
    }
    assert driver.exit_status == 0
    assert driver.results["failing"].status == 3
    assert driver.results["killed"].status == -signal.SIGKILL
    begun, *rest = lines
    assert begun["stages"] == list(states)
    newest = {line["stage"]: line for line in rest}
    assert {name: line["state"] for name, line in newest.items()} == states
    assert [line["state"] for line in rest[:2]] == ["running", "ok"]
    assert newest["needing"]["headline"] == "failing is failed"
    assert "give a larger --budget" in newest["long"]["headline"]
    assert newest["failing"]["tail"] == "no\n"
    assert (tmp_path / "last.log").read_text().endswith("the end\n")
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| well | ok |" in summary and "| so it is |" in summary
    again = "--only failing,killed,hanging,missing,needing,long"
    assert again in summary and again in capsys.readouterr().out


@pytest.mark.ranks
def test_what_a_stage_has_started_is_gone_with_it(tmp_path):
    file = tmp_path / "pid"
    stages = [
        shell("leaving", f"sleep 600 & echo $! > {file}"),
        shell("after", "exec true"),
    ]
    drive(tmp_path, *stages)
    deadline = time.monotonic() + 30
    while is_alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(file.read_text()))


def is_alive(pid):
    try:
        state = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        )
    except OSError:
        return False
    return state not in "ZX"


DRIVEN = """
import sys
from pathlib import Path
from benchmarks import gpu_hour
from benchmarks.gpu_stages import Places, Stage, last_line
folder = Path(sys.argv[1])
stages = [
    Stage("first", "", ("sh", "-c", "echo done"), 0.5, 0, last_line),
    Stage("second", "", ("sh", "-c", "echo half; sleep 600"), 0.5, 0, last_line),
    Stage("third", "", ("sh", "-c", "echo never"), 0.5, 0, last_line),
]
options = gpu_hour.Options(output=str(folder), budget=600.0)
driver = gpu_hour.Driver(stages, Places(folder, folder / "work", None), options)
driver.run()
sys.exit(driver.exit_status)
"""


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_newest_state_is_on_disk_when_the_driver_is_killed(
    tmp_path, number
):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVEN, str(tmp_path)], cwd=ROOT
    )
    try:
        log = tmp_path / "second.log"
        deadline = time.monotonic() + 60
        while not (
            log.exists() and "half" in log.read_text().split("\n", 1)[-1]
        ):
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.02)
    finally:
        driver.send_signal(number)
        status = driver.wait(60)
    newest = {line.get("stage"): line for line in lines_of(tmp_path)}
    assert newest["first"]["state"] == "ok"
    if number == signal.SIGKILL:
        assert newest["second"]["state"] == "running"
        assert "third" not in newest
        assert "| first | ok |" in (tmp_path / "summary.md").read_text()
    else:
        assert status == 128 + number
        assert newest["second"]["state"] == "stopped"
        assert newest["third"]["headline"] == "the driver was stopped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing"),
        (
            ["--output", "x", "--only", "stepps"],
            "--only has stepps: there are ",
        ),
        (["--output", "x", "--budget", "0"], "--budget is 0: give more than 0"),
        (["--output", "x", "--data", "/nowhere"], "there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_hour.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_list_has_commands_and_limits(capsys):
    assert gpu_hour.main(["--list", "--budget", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "device_tests          250 s  is what runs on the device" in shown
    assert "benchmarks/train_step.py --json" in shown


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of 300 users in nine domains."""
    folder = tmp_path_factory.mktemp("gpu_hour")
    synthesize_logs(
        folder / "logs",
        SyntheticConfig(users=300, items=600, domains=9, mean_length=15),
        processes=1,
    )
    logs = (str(folder / "logs"),)
    prepare(PrepareConfig(inputs=logs, output=str(folder / "data"), streams=2))
    return folder / "data"


def run_tiny(monkeypatch, output, *arguments):
    """The results of the tiny form, whose stages are forked where the stack is loaded."""
    monkeypatch.setattr(gpu_stages.sys, "executable", forked_python())
    for name, value in cpu_environment(
        IN_THIS_PROCESS="1", WITHOUT_REPORT="1"
    ).items():
        monkeypatch.setenv(name, value)
    words = ["--output", str(output), "--tiny", "--budget", "1200"]
    assert gpu_hour.main([*words, *arguments]) == 0
    newest = {line.get("stage"): line for line in lines_of(output)}
    newest.pop(None)
    return newest


@pytest.mark.ranks
def test_stages_run_in_their_tiny_form(monkeypatch, tmp_path, data):
    """Those that hold most of the code; the others are a slow test."""
    only = ("--data", str(data), "--only", ",".join(QUICK))
    newest = run_tiny(monkeypatch, tmp_path, *only)
    assert list(newest) == list(QUICK)
    for name, line in newest.items():
        assert line["state"] == "ok", (name, line["tail"])
        assert "no figures" not in line["headline"], line["headline"]
    assert "6 steps, loss " in newest["train"]["headline"]
    assert "10 steps, loss " in newest["resume"]["headline"]
    assert (tmp_path / "resume/operators.txt").is_file()
    assert "tokens/s" in newest["steps"]["headline"]
    assert (tmp_path / "profile.trace.json.gz").is_file()


@pytest.mark.slow
@pytest.mark.ranks
def test_every_stage_runs_in_its_tiny_form(tmp_path):
    """As a person would start it."""
    command = [sys.executable, "benchmarks/gpu_hour.py", "--tiny"]
    command += ["--budget", "3000", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0
    newest = {line.get("stage"): line for line in lines_of(tmp_path)}
    newest.pop(None)
    names = [stage.name for stage in list_stages(places(tmp_path), True)]
    assert list(newest) == names
    for name, line in newest.items():
        assert line["state"] == "ok", (name, line["tail"])
        assert "no figures" not in line["headline"], line["headline"]
