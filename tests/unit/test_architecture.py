"""Imports run launch → trainer → {embeddings, syncrec} → syncrec_kernels, and the model knows nothing of ranks or of the table."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {
    "launch",
    "trainer",
    "embeddings",
    "syncrec",
    "syncrec_kernels",
    "tests",
    "benchmarks",
}
MAY_IMPORT = {
    "launch": {"launch", "trainer", "embeddings", "syncrec"},
    "trainer": {"trainer", "embeddings", "syncrec"},
    "embeddings": {"embeddings", "syncrec_kernels"},
    "syncrec": {"syncrec", "syncrec_kernels"},
    "syncrec_kernels": {"syncrec_kernels"},
}
FORBIDDEN = {
    "syncrec": (
        "torchrec",
        "fbgemm_gpu",
        "deepspeed",
        "torch.distributed",
        "webdataset",
    )
}


def imports(source, module, everywhere=True):
    """The dotted names that a module imports or reaches as an attribute of `torch`, inside functions too.

    module: its own dotted name, for relative imports. everywhere: False for what runs when the module is imported.
    """
    names = set()

    def visit(node):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.rsplit(".", node.level)[0] if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            names.add(f"torch.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[
            -1
        ] in (
            "import_module",
            "__import__",
        ):
            names.update(
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant)
            )
        for child in ast.iter_child_nodes(node):
            if everywhere or not isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef)
            ):
                visit(child)

    visit(ast.parse(source))
    return names


def violations(source, module):
    """What the module may not import."""
    folder = module.split(".")[0]
    found = []
    for name in imports(source, module):
        if (top := name.split(".")[0]) in OURS and top not in MAY_IMPORT[
            folder
        ]:
            found.append(name)
        found += [
            name
            for forbidden in FORBIDDEN.get(folder, ())
            if f"{name}.".startswith(f"{forbidden}.")
        ]
    return found


def modules():
    for folder in MAY_IMPORT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def test_every_folder_has_modules():
    assert {
        module.split(".")[0] for module, _ in modules()
    } == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("module", "path"), list(modules()), ids=[module for module, _ in modules()]
)
def test_imports_run_downwards(module, path):
    assert violations(path.read_text(encoding="utf-8"), module) == []


def test_no_module_imports_itself_around_a_corner():
    known = {
        module.removesuffix(".__init__"): path for module, path in modules()
    }
    graph = {}
    for module, path in known.items():
        names = imports(
            path.read_text(encoding="utf-8"), module, everywhere=False
        )
        named = {
            name if name in known else name.rpartition(".")[0] for name in names
        }
        graph[module] = named & known.keys() - {module}
    TopologicalSorter(
        graph
    ).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("syncrec.model", "import trainer.training.loop"),
        ("syncrec.model", "from embeddings.table import ItemTable"),
        ("syncrec.model", "import torch.distributed as dist"),
        ("syncrec.model", "from torch import distributed"),
        ("syncrec.model", "import torch\ntorch.distributed.all_reduce(1)"),
        ("syncrec.model", "from torch.distributed.nn import all_gather"),
        ("syncrec.model", "def f():\n    import torchrec"),
        ("syncrec.model", "from deepspeed.ops import adam"),
        ("embeddings.table", "from syncrec import model"),
        ("embeddings.table", "from trainer.errors import InputError"),
        ("syncrec_kernels.build", "from embeddings import scores"),
        ("trainer.data.loading.stream", "from launch.stack import check_stack"),
        (
            "trainer.training.loop",
            "import importlib\nimportlib.import_module('launch.train')",
        ),
        ("launch.train", "from tests.syncrec import reference"),
    ],
)
def test_a_forbidden_import_is_seen(module, source):
    assert violations(source, module)


def test_what_is_allowed_is_not_reported():
    assert not violations(
        "from trainer.training.loop import train\nimport torch.distributed as dist",
        "launch.train",
    )
    assert not violations(
        "import torch\nfrom torch import nn\nfrom syncrec.batch.build import Query",
        "syncrec.model",
    )
    assert not violations(
        "from .rows import RowScatter\nimport torchrec", "embeddings.table"
    )
