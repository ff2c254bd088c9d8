"""Folders that somebody else has made: reading them starts nothing, asks nobody and leads nowhere else."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import deepspeed
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import HELPERS
from tests.helpers.rank_processes import run_alone
from tests.helpers.runs import finished_run, rank_of_one, seal
from trainer.checkpoint.best_model import open_run
from trainer.checkpoint.warm_start import find_warm_start
from trainer.config.load import (
    flatten_config,
    load_config,
    load_recorded,
    to_yaml,
)
from trainer.config.retraining import PublishConfig, RetrainConfig
from trainer.config.run import RunConfig
from trainer.config.serving import (
    ExportConfig,
    HistoriesConfig,
    RecommendConfig,
)
from trainer.data.duckdb_engine import open_connection
from trainer.data.format.dataset import Dataset, File
from trainer.data.format.vocabulary import read_item_counts, read_item_ids
from trainer.errors import InputError
from trainer.evaluation.evaluate_run import evaluate_run
from trainer.retraining.item_drift import measure_drift
from trainer.retraining.job import retrain
from trainer.retraining.publish import publish
from trainer.retraining.published import read_current_version
from trainer.retraining.registry import roll_back
from trainer.serving.example import load_encoder
from trainer.serving.export import export_run
from trainer.serving.recommend import recommend

ROOT = Path(__file__).resolve().parents[4]
SECRET = "token-of-the-operator"


class Canaries:
    """What nobody may touch: a file that commands make, a server that is asked, a secret in the environment."""

    def __init__(self, folder):
        self.mark = folder / "mark"
        self.asked = []
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), BaseHTTPRequestHandler
        )
        self.server.RequestHandlerClass = type(
            "Handler", (BaseHTTPRequestHandler,), self._answers()
        )
        self.server.daemon_threads = True
        threading.Thread(
            target=self.server.serve_forever, args=(0.01,), daemon=True
        ).start()
        self.http = f"http://127.0.0.1:{self.server.server_port}"
        programs = folder / "programs"
        programs.mkdir()
        for name in ("gsutil", "curl", "ais"):
            (programs / name).write_text(f"#!/bin/sh\ntouch {self.mark}\n")
            (programs / name).chmod(0o755)
        self.path = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def _answers(self):
        def answer(handler):
            self.asked.append(handler.path)
            handler.send_error(404)

        return {
            "do_GET": answer,
            "do_HEAD": answer,
            "log_message": lambda *_: None,
        }

    def check(self, said=""):
        """Raises AssertionError where one was touched, or the secret is said."""
        assert not self.mark.exists()
        assert self.asked == []
        assert SECRET not in str(said)


class Planted:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def canaries(tmp_path, monkeypatch):
    own = Canaries(tmp_path)
    monkeypatch.setenv("TRUST_SECRET", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PATH", own.path)
    yield own
    own.check()
    own.server.shutdown()
    own.server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks:
        yield finished_run(tmp_path_factory.mktemp("run"), ranks)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_run(run.folder, folder, run.ranks, ExportConfig())
    return folder


def said_of(call, *arguments, kind=InputError):
    """The one line of what it refuses."""
    with pytest.raises(kind) as error:
        call(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.ranks
def test_the_canaries_sing(tmp_path, canaries):
    pickle.loads(pickle.dumps(Planted(canaries.mark)))
    assert canaries.mark.exists()
    canaries.mark.unlink()
    subprocess.run(["gsutil"], check=True)
    assert canaries.mark.exists()
    canaries.mark.unlink()
    with pytest.raises(InputError):
        Dataset.load(f"{canaries.http}/${{x}}")
    assert canaries.asked == ["/$%7Bx%7D/dataset.json"]
    canaries.asked.clear()


# A run's folder


def setting(key, value):
    def spoil(text, _):
        lines = [
            line
            for line in text.splitlines(True)
            if not line.startswith(f"{key}:")
        ]
        assert len(lines) < len(text.splitlines())
        return "".join([*lines, f"{key}: {value}\n"])

    return spoil


def data_of(place):
    return setting("data", json.dumps(place))


def more(line):
    return lambda text, _: text + line


def instead(content):
    return lambda *_: content


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
RUNS = {
    "a command": (
        data_of("pipe:touch {mark}; cat {data}/{{}}"),
        "pipe:.*give it as --data",
    ),
    "a command as a file": (
        data_of("file:pipe:touch {mark}; cat {data}/{{}}"),
        "which is not there: give its dataset as --data",
    ),
    "a command in code": (
        data_of("file:%70ipe:touch {mark}; cat {data}/{{}}"),
        "which is not there: give its dataset as --data",
    ),
    "an address": (data_of("{http}"), "give it as --data"),
    "an address with the environment": (
        data_of("{http}/${{oc.env:TRUST_SECRET}}"),
        r"data has \$",
    ),
    "a cloud's program": (
        data_of("gs://bucket/folder"),
        "gs://bucket/folder.*give it as --data",
    ),
    "curl": (data_of("sftp://host/folder"), "give it as --data"),
    "the environment in another key": (
        setting("warm_start", "${{oc.env:TRUST_SECRET}}"),
        r"warm_start has \$",
    ),
    "the environment in a list": (
        setting("deepspeed", "{{a: [1, {{b: '${{oc.env:TRUST_SECRET}}'}}]}}"),
        r"deepspeed\.a\[1\]\.b has \$",
    ),
    "another resolver": (setting("run", "'${{oc.decode:x}}'"), r"run has \$"),
    "an escaped backslash": (
        setting("run", "'a\\\\${{oc.env:TRUST_SECRET}}'"),
        r"run has \$",
    ),
    "a key": (
        setting("deepspeed", "{{'${{oc.env:TRUST_SECRET}}': 1}}"),
        "the key .* has",
    ),
    "a tag": (
        setting(
            "warm_start", "!!python/object/apply:os.system ['touch {mark}']"
        ),
        "tag",
    ),
    "a tag of its own": (setting("warm_start", "!own x"), "has the tag !own"),
    "an alias bomb": (instead(BOMB), "line 1 has an anchor"),
    "an alias": (setting("deepspeed", "&a {{a: *a}}"), "has an anchor"),
    "too much": (more("#" * 70_000), "has more than 65536 bytes"),
    "a NUL": (instead("data: \0"), "is no YAML"),
    "no UTF-8": (instead(b"data: \xff"), "is no YAML"),
    "a list": (instead("[1, 2]"), "is a list"),
    "a key twice": (more("seed: 1\n"), "is no YAML.*seed"),
    "a wrong kind": (instead("model: 3"), "model is 3"),
    "a bad value": (instead("epochs: 0"), r"config\.yaml: epochs is 0"),
    "a depth": (instead("deepspeed: " + "[" * 20_000), "is deeper than 32"),
    "a terminal's orders": (instead('"\\e[2Jx": 1'), "not in 'RunConfig'"),
    "two documents": (more("---\nseed: 1\n"), "is no YAML"),
}


def hostile(run, canaries, folder, case):
    """A copy of a run whose config.yaml is spoiled."""
    other = run.copied(folder / "hostile")
    file = other.folder / "config.yaml"
    spoil = RUNS[case][0](file.read_text(), None)
    if isinstance(spoil, str):
        for word, value in {
            "mark": canaries.mark,
            "http": canaries.http,
            "data": run.dataset.folder,
        }.items():
            spoil = spoil.replace(f"{{{word}}}", str(value))
        spoil = spoil.replace("{{", "{").replace("}}", "}").encode()
    file.write_bytes(spoil)
    return other.folder


@pytest.mark.parametrize("case", RUNS)
def test_a_runs_configuration_starts_nothing(run, tmp_path, canaries, case):
    folder = hostile(run, canaries, tmp_path, case)
    said = said_of(evaluate_run, folder, run.ranks)
    canaries.check(said)
    with pytest.raises(InputError, match=RUNS[case][1]):
        open_run(folder)


COMMANDS = {
    "evaluate": lambda run, ranks, out: evaluate_run(run, ranks),
    "export": lambda run, ranks, out: export_run(
        run, out, ranks, ExportConfig()
    ),
    "recommend": lambda run, ranks, out: recommend(
        run, out, ranks, RecommendConfig(), HistoriesConfig()
    ),
    "publish": lambda run, ranks, out: publish(
        run, out, ranks, PublishConfig()
    ),
}


@pytest.mark.parametrize(
    "case", ["a command", "an address with the environment"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_neither_by_any_other_command(run, tmp_path, canaries, command, case):
    folder = hostile(run, canaries, tmp_path, case)
    canaries.check(
        said_of(COMMANDS[command], folder, run.ranks, tmp_path / "out")
    )


def of_another_dataset(folder):
    """Says of a run's best model that it was trained on another dataset."""
    state = next((folder / "checkpoints").iterdir()) / "state.json"
    state.write_text(
        json.dumps(json.loads(state.read_text()) | {"dataset": "0" * 64})
    )
    seal(state.parent)


@pytest.mark.parametrize(
    "case",
    [
        "a command",
        "an address",
        "a cloud's program",
        "the environment in a list",
    ],
)
def test_neither_where_a_run_begins_with_another(run, tmp_path, canaries, case):
    folder = hostile(run, canaries, tmp_path, case)
    of_another_dataset(folder)
    config = run.configured(f"warm_start={folder}")
    said = said_of(find_warm_start, config, run.dataset, run.ranks)
    assert str(folder) in said
    canaries.check(said)
    said = said_of(
        evaluate_run, folder, run.ranks, "test", run.dataset.folder
    )  # its model on another dataset
    canaries.check(said)


@pytest.mark.ranks
def test_an_address_is_taken_from_who_gives_it(run, tmp_path, canaries):
    folder = hostile(run, canaries, tmp_path, "a command")
    config, dataset = open_run(folder, f"pipe:cat {run.dataset.folder}/{{}}")
    assert (
        dataset.fingerprint == run.dataset.fingerprint
        and config.data.startswith("pipe:cat ")
    )


def test_deepspeeds_section_of_a_run_reaches_no_engine(
    run, tmp_path, canaries, monkeypatch
):
    other = run.copied(tmp_path / "other")
    section = {
        "flops_profiler": {"enabled": True, "output_file": str(canaries.mark)}
    }
    section |= {
        "csv_monitor": {"enabled": True, "output_path": str(canaries.mark)}
    }
    recorded = yaml.safe_load((other.folder / "config.yaml").read_text())
    recorded["deepspeed"] |= section
    (other.folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    monkeypatch.setattr(deepspeed, "initialize", None)
    assert evaluate_run(other.folder, run.ranks)["kind"] == "test"


@settings(max_examples=20)
@given(st.text("\\${}:.,'\" \n#&*!-aenvoc", max_size=30))
def test_what_a_run_writes_reads_back_as_it_was_whatever_it_is(text):
    config = RunConfig(run=text, deepspeed={"a": [text, {"b": text}]})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config))
        assert load_recorded(file) == config == load_config([file], [])
        assert flatten_config(config)["run"] == text


def test_what_is_resolved_is_kept_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_FOLDER", "/somewhere/${x}")
    config = load_config([], ["run=${oc.env:TRUST_FOLDER}/1"])
    assert config.run == "/somewhere/${x}/1"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_recorded(tmp_path / "config.yaml") == config


def test_a_command_is_not_kept(monkeypatch):
    monkeypatch.setenv("TRUST_SECRET", SECRET)
    config = load_config(
        [],
        [
            "data=pipe:curl -H 'Authorization: ${oc.env:TRUST_SECRET}' https://host/{}"
        ],
    )
    assert SECRET in config.data
    assert (
        SECRET not in to_yaml(config)
        and SECRET not in str(flatten_config(config))
        and "pipe:…" in to_yaml(config)
    )


# A dataset


def renamed(name):
    def spoil(folder, facts, canaries):
        domain = facts["domains"][0]
        before, domain["vocabulary"] = (
            domain["vocabulary"],
            name.format(http=canaries.http, mark=canaries.mark),
        )
        for file in facts["files"]:
            if file["name"] == before:
                file["name"] = domain["vocabulary"]
        target = folder / domain["vocabulary"]
        if (
            target.resolve().is_relative_to(folder.resolve())
            and len(target.name) < 200
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / before, target)

    return spoil


def pickled_lengths(folder, facts, canaries):
    array = np.empty((20, 2), object)
    array[:] = Planted(canaries.mark)
    np.save(folder / "lengths.npy", array, allow_pickle=True)


def extension_type(folder, facts, canaries):
    """pyarrow once unpickled a type of this name."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Planted(canaries.mark)),
    }
    file = folder / facts["domains"][0]["vocabulary"]
    table = pq.read_table(file)
    field = table.schema.field("item_id").with_metadata(metadata)
    pq.write_table(
        table.cast(pa.schema([field, *list(table.schema)[1:]])), file
    )


DATASETS = {
    "a name above": (renamed("../data-0.parquet"), "is no name of a file"),
    "a name elsewhere": (renamed("/etc/passwd"), "is no name of a file"),
    "names of many": (renamed("vocabulary/*.parquet"), "is no name of a file"),
    "names of one of some": (
        renamed("vocabulary/[0].parquet"),
        "is no name of a file",
    ),
    "a line's end": (renamed("vocabulary/0\n.parquet"), "is no name of a file"),
    "an address for a name": (renamed("{http}/0.parquet"), None),
    "SQL for a name": (
        renamed("vocabulary/x') , (COPY (SELECT 1) TO '{mark}').parquet"),
        None,
    ),
    "pickled lengths": (pickled_lengths, "cannot be read"),
    "a pickled type": (extension_type, None),
}


@pytest.mark.parametrize("case", DATASETS)
def test_a_dataset_starts_nothing(run, tmp_path, canaries, case):
    spoil, message = DATASETS[case]
    folder = tmp_path / "data"
    shutil.copytree(run.dataset.folder, folder)
    facts = json.loads((folder / "dataset.json").read_text())
    spoil(folder, facts, canaries)
    for file in facts["files"]:
        if (folder / file["name"]).is_file():
            file |= {
                key: value
                for key, value in vars(File.of(folder, file["name"])).items()
            }
    (folder / "dataset.json").write_text(json.dumps(facts))

    def read():
        dataset = Dataset.load(folder)
        assert dataset.lengths.shape == (20, 2)
        assert (
            len(read_item_ids(dataset, dataset.domains[0])) == 5
            and read_item_counts(dataset).sum() > 0
        )
        return evaluate_run(
            run.folder,
            run.ranks,
            data=folder,
            output=tmp_path / "ranks.parquet",
        )

    if message is None:
        assert read()["kind"] == "test"
    else:
        said = said_of(read)
        assert message in said
        canaries.check(said)


@pytest.mark.parametrize(
    "facts", ["{", "{}", '{"of": "%s", "span_before": 1}', "[]"]
)
def test_an_extension_that_is_none_is_named(run, tmp_path, facts):
    folder = tmp_path / "data"
    shutil.copytree(run.dataset.folder, folder)
    (folder / "extension").mkdir()
    (folder / "extension" / "extension.json").write_text(
        facts.replace("%s", "0" * 64)
    )
    other = run.copied(tmp_path / "other")
    of_another_dataset(other.folder)
    assert "extension: cannot be used" in said_of(
        evaluate_run, other.folder, run.ranks, "test", folder
    )


def test_duckdb_fetches_no_extension(canaries):
    def ask(connection):
        connection.execute(
            f"SET autoinstall_extension_repository = '{canaries.http}'"
        )
        with pytest.raises(duckdb.Error):
            connection.sql(
                "FROM read_parquet('s3://bucket/x.parquet')"
            ).fetchall()

    ask(open_connection())
    canaries.check()
    ask(duckdb.connect())
    assert canaries.asked
    canaries.asked.clear()


# An exported model


class Archive:
    """An encoder.pt2 as members by name, and its JSON."""

    def __init__(self, file):
        with zipfile.ZipFile(file) as archive:
            self.root = archive.namelist()[0].partition("/")[0]
            self.members = {
                info.filename.partition("/")[2]: archive.read(info)
                for info in archive.infolist()
            }
        self.more, self.compression = [], zipfile.ZIP_STORED
        self.model = json.loads(self.members["models/model.json"])
        self.weights = json.loads(
            self.members["data/weights/model_weights_config.json"]
        )
        self.constants = json.loads(
            self.members["data/constants/model_constants_config.json"]
        )

    @property
    def graph(self):
        return self.model["graph_module"]["graph"]

    def node(self, name):
        """The first node of an operator."""
        return next(
            node
            for node in self.graph["nodes"]
            if f"aten.{name}." in node["target"]
        )

    def write(self, file):
        own = {
            "models/model.json": self.model,
            "data/weights/model_weights_config.json": self.weights,
        }
        own["data/constants/model_constants_config.json"] = self.constants
        members = self.members | {
            name: json.dumps(value).encode() for name, value in own.items()
        }
        with zipfile.ZipFile(file, "w", self.compression) as archive:
            for name, content in [*members.items(), *self.more]:
                archive.writestr(f"{self.root}/{name}", content)


def planted(mark):
    stream = io.BytesIO()
    torch.save(Planted(mark), stream)
    return stream.getvalue()


def pickled_weight(archive, mark):
    payload = next(iter(archive.weights["config"].values()))
    payload["use_pickle"] = True
    archive.members[f"data/weights/{payload['path_name']}"] = planted(mark)


def old_weights(archive, mark):
    archive.members["data/weights/model.pt"] = planted(mark)


def sample_inputs(archive, mark):
    archive.members["data/sample_inputs/model.pt"] = planted(mark)


def constant(path, content):
    def spoil(archive, mark):
        payload = {
            "path_name": path,
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
        archive.constants["config"]["constant"] = payload
        archive.members[f"data/constants/{path}"] = content(mark)

    return spoil


def member(name, content=b"x"):
    def spoil(archive, mark):
        archive.members[name] = content

    return spoil


def member_twice(archive, mark):
    archive.more.append(("models/model.json", b"{}"))


def member_above(archive, mark):
    archive.root = "../../root"
    archive.members = {
        f"../{name}": content for name, content in archive.members.items()
    }


def compressed(archive, mark):
    archive.compression = zipfile.ZIP_DEFLATED


def expression(archive, mark):
    sizes = next(
        size
        for meta in archive.graph["tensor_values"].values()
        for size in meta["sizes"]
        if "as_expr" in size
    )
    sizes["as_expr"]["expr_str"] = f"__import__('os').system('touch {mark}')"


def attribute_in_expression(archive, mark):
    value = next(iter(archive.graph["sym_int_values"].values()))
    value["as_expr"]["expr_str"] = (
        "Symbol('s1', positive=True, integer=True).__class__"
    )


def condition(archive, mark):
    archive.model["guards_code"] = [
        f"(__import__('os').system('touch {mark}') or True)"
    ]


def function(archive, mark):
    node = archive.node("clamp")
    node["target"] = "torch.os.system"
    command = {
        "name": "command",
        "arg": {"as_string": f"touch {mark}"},
        "kind": 1,
    }
    node["inputs"] = [command]


def operator(target):
    def spoil(archive, mark):
        archive.node("clamp")["target"] = target

    return spoil


def name_that_is_code(archive, mark):
    inner = archive.graph["inputs"][0]["as_tensor"]["name"]
    code = f"a\n    __import__('os').system('touch {mark}')\n    b"
    text = json.dumps(archive.model).replace(
        json.dumps(inner), json.dumps(code)
    )
    archive.model = json.loads(text)


def tree(**spec):
    def spoil(archive, mark):
        signature = archive.model["graph_module"]["module_call_graph"][0][
            "signature"
        ]
        signature["in_spec"] = json.dumps([1, spec])

    return spoil


def named_function(archive, mark):
    archive.node("clamp")["inputs"].append(
        {"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 2}
    )


def larger_than_it_is(archive, mark):
    payload = next(iter(archive.weights["config"].values()))
    payload["tensor_meta"]["sizes"] = [{"as_int": 2**40}]
    archive.members[f"data/weights/{payload['path_name']}"] = b""


def cut_short(archive, mark):
    archive.members = {
        name: content
        for name, content in archive.members.items()
        if "byteorder" not in name
    }
    del archive.weights["config"]


FACTORY = json.dumps(
    {
        "default_factory_module": "antigravity",
        "default_factory_name": "x",
        "dict_context": [],
    }
)
ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
ENCODERS = {
    "a pickled weight": (pickled_weight, "use_pickle"),
    "pickled weights of an old format": (old_weights, "model.pt"),
    "pickled sample inputs": (sample_inputs, "sample inputs"),
    "a pickled tensor": (constant("tensor_0", planted), "use_pickle"),
    "an opaque object": (
        constant("opaque_obj_0", lambda mark: pickle.dumps(Planted(mark))),
        "opaque_obj_0",
    ),
    "an object of TorchScript's": (
        constant("custom_obj_0", planted),
        "custom_obj_0",
    ),
    "a compiled library": (
        member("data/aotinductor/model/model.so"),
        "aotinductor",
    ),
    "ExecuTorch": (member("data/executorch/model.pte"), "executorch"),
    "another file": (member("extra/note.txt"), "extra/note.txt"),
    "another model": (member("models/other.json", b"{}"), "other.json"),
    "a member twice": (member_twice, "models/model.json"),
    "a member above": (member_above, "a member"),
    "what was compressed": (compressed, "(larger than the file|a member)"),
    "code for an expression": (expression, "expr_str"),
    "an attribute in an expression": (attribute_in_expression, "expr_str"),
    "code for a condition": (condition, None),
    "a function of Python's": (function, "torch.os.system"),
    "a function as an argument": (named_function, "as_operator"),
    "an operator that maps files": (
        operator("torch.ops.aten.from_file.default"),
        "from_file",
    ),
    "an operator of another library": (
        operator("torch.ops.fbgemm.x.default"),
        "fbgemm",
    ),
    "an operator of operators": (
        operator("torch.ops.higher_order.cond"),
        "higher_order",
    ),
    "code for a name": (name_that_is_code, "name is"),
    "a tree that imports": (
        tree(type="collections.defaultdict", context=FACTORY, children_spec=[]),
        "in_spec",
    ),
    "a tree of choices": (
        tree(type="builtins.dict", context=ENUM, children_spec=[]),
        "in_spec",
    ),
    "a tensor larger than it is": (larger_than_it_is, "larger than it is"),
    "no weights": (cut_short, "has no 'config'"),
    "no archive": (None, "no whole archive"),
}


def spoiled(exported, folder, case, mark, where="encoder.pt2"):
    """A copy of an exported model with another encoder, whose checksum is right."""
    shutil.copytree(exported, folder)
    spoil = ENCODERS[case][0]
    if spoil is None:
        (folder / where).write_bytes(b"PK\3\4")
    else:
        archive = Archive(exported / "encoder.pt2")
        spoil(archive, mark)
        archive.write(folder / where)
    schema = json.loads((folder / "schema.json").read_text())
    file = File.of(folder, where)
    schema["files"][where] = {"bytes": file.bytes, "sha256": file.sha256}
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder


def published(folder, model, **changes):
    """A folder of published versions with one in it."""
    version = folder / "versions" / "0001"
    version.parent.mkdir(parents=True)
    version.mkdir()
    shutil.copytree(model, version / "model")
    record = {
        "number": "0001",
        "run": "/gone",
        "dataset": "",
        "best": {},
        "domains": {},
    } | changes
    (version / "version.json").write_text(json.dumps(record))
    (folder / "current.json").write_text(
        json.dumps({"version": "0001", "model": "versions/0001/model"})
    )
    return folder


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_is_tensors_and_operations_or_is_not_loaded(
    exported, tmp_path, canaries, case
):
    message = ENCODERS[case][1]
    model = spoiled(exported, tmp_path / "model", case, canaries.mark)
    if message is None:
        encoder = load_encoder(model / "encoder.pt2")
        now = torch.zeros(1, dtype=torch.float64)
        encoder(
            torch.zeros(1, 1, 8),
            torch.tensor([1]),
            torch.zeros(1, 1, dtype=torch.float64),
            now,
        )
        return
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(model / "encoder.pt2")
    assert str(error.value).isprintable() and str(model / "encoder.pt2") in str(
        error.value
    )
    canaries.check()
    folder = published(tmp_path / "published", model)
    assert "does not load" in said_of(roll_back, folder, "0001")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("case", ["a pickled weight", "code for an expression"])
def test_so_is_a_domains_own(exported, tmp_path, canaries, case):
    model = spoiled(
        exported,
        tmp_path / "model",
        case,
        canaries.mark,
        "domain-1/encoder.pt2",
    )
    folder = published(tmp_path / "published", model)
    assert "domain-1/encoder.pt2" in said_of(roll_back, folder, "0001")
    canaries.check()


def test_what_was_exported_is_published_as_ever(exported, tmp_path):
    archive = Archive(
        exported / "encoder.pt2"
    )  # written by another hand, with nothing changed
    archive.write(tmp_path / "encoder.pt2")
    load_encoder(tmp_path / "encoder.pt2")
    assert (
        roll_back(published(tmp_path / "published", exported), "0001")["number"]
        == "0001"
    )


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/hostname", "domain-0/../../x"]
)
def test_files_of_a_version_lie_in_it(exported, tmp_path, name):
    folder = published(tmp_path / "published", exported)
    file = folder / "versions/0001/model/schema.json"
    schema = json.loads(file.read_text())
    schema["files"][name] = {"bytes": 0, "sha256": ""}
    file.write_text(json.dumps(schema))
    assert "is no name of a file in it" in said_of(roll_back, folder, "0001")


@pytest.mark.parametrize(
    "version", ["../../elsewhere", "/elsewhere", 3, None, ""]
)
def test_the_current_version_is_one_of_them(exported, tmp_path, version):
    folder = published(tmp_path / "published", exported)
    (folder / "current.json").write_text(json.dumps({"version": version}))
    assert "is no version's number" in said_of(read_current_version, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": 3},
        {"number": "../x"},
        {"domains": {"a": 1}},
        {"domains": []},
        {"run": "a\nb"},
    ],
)
def test_a_versions_record_is_one(exported, tmp_path, changes):
    folder = published(tmp_path / "published", exported, **changes)
    assert "version" in said_of(
        read_current_version, folder
    ) and "version" in said_of(roll_back, folder, "0001")


def test_the_run_that_a_version_names_is_trusted_no_more_than_others(
    run, exported, tmp_path, canaries
):
    folder = hostile(run, canaries, tmp_path, "the environment in another key")
    where = published(tmp_path / "published", exported, run=str(folder))
    canaries.check(
        said_of(publish, run.folder, where, run.ranks, PublishConfig())
    )


@pytest.mark.parametrize("name", ["..", "../../model", "/tmp", "domain-0/.."])
def test_domains_of_an_exported_model_lie_in_it(exported, tmp_path, name):
    from trainer.serving.example import Recommender

    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    schema = json.loads((folder / "schema.json").read_text())
    schema["domains"][0]["folder"] = name
    (folder / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(ValueError, match="is no domain's folder"):
        Recommender(folder)
    assert "is no domain's folder" in said_of(measure_drift, folder, folder)


# A retraining's folder


RECORDS = {
    "a day that is another folder": (
        "retrain.json",
        {"name": "../../precious"},
        "is not this day's",
    ),
    "a plan that extends another": (
        "plan.json",
        {"extends": "../../precious/dataset"},
        "extends is",
    ),
    "a plan that extends an option": (
        "plan.json",
        {"extends": "/precious"},
        "extends is",
    ),
    "a plan with the environment": (
        "plan.json",
        {"warm_start": "${oc.env:TRUST_SECRET}"},
        "warm_start is",
    ),
    "a plan that compares another": (
        "plan.json",
        {"before": "../precious"},
        "before is",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_of_a_retraining_lead_nowhere_else(tmp_path, canaries, case):
    file, changes, message = RECORDS[case]
    folder = tmp_path / "retraining"
    for part in ("dataset", "run"):
        (tmp_path / "precious" / part).mkdir(parents=True)
    day = folder / "days" / "1"
    day.mkdir(parents=True)
    plan = {
        "name": "1",
        "number": 1,
        "input": ["log"],
        "extends": None,
        "warm_start": None,
        "before": None,
    }
    result = {"name": "1", "number": 1, "published": None}
    (day / "plan.json").write_text(
        json.dumps(plan | (changes if file == "plan.json" else {}))
    )
    if file == "retrain.json":
        (day / "retrain.json").write_text(json.dumps(result | changes))
    name = "2" if file == "retrain.json" else "1"
    config = RetrainConfig(
        folder=str(folder), name=name, input=["log"], keep_days=1
    )
    said = said_of(retrain, config, HELPERS.joinpath("fake_retrain"))
    assert message in said
    canaries.check(said)
    assert (tmp_path / "precious" / "run").is_dir() and not (
        folder / "calls.txt"
    ).exists()


# As processes


def status_of(*command):
    done = run_alone(*command, PYTHONPATH=str(ROOT))
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.ranks
def test_commands_start_nothing_either(run, exported, tmp_path, canaries):
    folder = hostile(run, canaries, tmp_path, "an address with the environment")
    status, lines = status_of(ROOT / "launch/evaluate.py", "--run", folder)
    assert (
        status == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and "data has ${…}" in lines[0]
    )
    model = spoiled(
        exported, tmp_path / "model", "a pickled weight", canaries.mark
    )
    status, lines = status_of(model / "example.py", "domain 0", "3")
    assert status != 0 and "use_pickle" in lines[-1]
    canaries.check()
