"""How the product is written, in figures, and whether they hold: `make style`.

    python tests/style.py [FOLDER …]     all rooms of the product, or the ones named

Density is syntax-tree nodes on a line of code. Counted are statements and expressions; contexts,
operators and the wrappers of arguments are not, since they say nothing by themselves. A line of code
is one that is neither blank nor only a comment. By this count TorchRec 1.8 has 2.8 and rich 2.8.
"""

import ast
import sys
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("trainer", "syncrec", "embeddings", "syncrec_kernels", "launch")
LONGEST_LINE = 100
LONGEST_FUNCTION = 60
MOST_MODULES = 14

MOST_DENSITY = 3.6
MOST_TUPLE_ASSIGNMENTS = 3.0  # in a thousand lines of code
MOST_COMPREHENSIONS = 25.0  # in a thousand lines of code
LEAST_ANNOTATED = 0.9  # of the arguments of public functions
MOST_LONG_LINES = 0.01

# Functions that may be longer than a screen, each with its reason.
LONG_FUNCTIONS: dict[str, str] = {}

_WRAPPERS = (
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.arguments,
    ast.arg,
    ast.keyword,
    ast.alias,
)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Counts:
    """What is counted in some files."""

    lines: int = 0  # of code
    nodes: int = 0
    tuple_assignments: int = 0
    comprehensions: int = 0
    arguments: int = 0  # of public functions
    annotated: int = 0
    all_lines: int = 0
    long_lines: int = 0

    def add(self, other: "Counts") -> None:
        """Adds another's counts."""
        for field in fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    @property
    def density(self) -> float:
        return self.nodes / max(1, self.lines)

    @property
    def tuple_share(self) -> float:
        return 1000 * self.tuple_assignments / max(1, self.lines)

    @property
    def comprehension_share(self) -> float:
        return 1000 * self.comprehensions / max(1, self.lines)

    @property
    def annotated_share(self) -> float:
        return self.annotated / max(1, self.arguments)

    @property
    def long_share(self) -> float:
        return self.long_lines / max(1, self.all_lines)

    def troubles(self) -> list[str]:
        """Which figures do not hold."""
        lines = []
        if self.density > MOST_DENSITY:
            lines.append(f"density {self.density:.2f}, at most {MOST_DENSITY}")
        if self.tuple_share > MOST_TUPLE_ASSIGNMENTS:
            lines.append(
                f"{self.tuple_share:.1f} tuple assignments, at most {MOST_TUPLE_ASSIGNMENTS}"
            )
        if self.comprehension_share > MOST_COMPREHENSIONS:
            lines.append(
                f"{self.comprehension_share:.1f} comprehensions, at most {MOST_COMPREHENSIONS}"
            )
        if self.annotated_share < LEAST_ANNOTATED:
            lines.append(
                f"{self.annotated_share:.0%} of arguments have a type, at least {LEAST_ANNOTATED:.0%}"
            )
        if self.long_share > MOST_LONG_LINES:
            lines.append(
                f"{self.long_share:.1%} of lines are long, at most {MOST_LONG_LINES:.0%}"
            )
        return lines


def count(file: Path) -> Counts:
    """The counts of one file."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    counts = Counts()
    for line in text.splitlines():
        counts.all_lines += 1
        counts.long_lines += len(line) > LONGEST_LINE
        stripped = line.strip()
        counts.lines += bool(stripped) and not stripped.startswith("#")
    for node in ast.walk(tree):
        counts.nodes += not isinstance(node, _WRAPPERS)
        counts.comprehensions += isinstance(node, _COMPREHENSIONS)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            counts.tuple_assignments += not _swaps(node)
    for function in public_functions(tree):
        for argument in arguments_of(function):
            counts.arguments += 1
            counts.annotated += argument.annotation is not None
    return counts


def _swaps(node: ast.Assign) -> bool:
    """`a, b = b, a`."""
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return True  # a name for a tuple
    left = [ast.unparse(element) for element in target.elts]
    right = [ast.unparse(element) for element in node.value.elts]
    return sorted(left) == sorted(right)


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions of the module and methods of its classes without a leading underscore, and `__init__`."""
    functions = []
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            continue
        for function in inside:
            if not isinstance(function, _FUNCTIONS):
                continue
            if function.name == "__init__" or not function.name.startswith("_"):
                functions.append(function)
    return functions


def arguments_of(function: ast.FunctionDef) -> list[ast.arg]:
    """A function's arguments without self and cls."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [arguments.vararg, arguments.kwarg]
    named += [argument for argument in starred if argument is not None]
    return [
        argument for argument in named if argument.arg not in ("self", "cls")
    ]


def long_functions(file: Path) -> list[str]:
    """Functions over LONGEST_FUNCTION lines that have no reason."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, _FUNCTIONS):
            continue
        length = node.end_lineno - node.lineno + 1
        name = f"{file.relative_to(ROOT).as_posix()}::{node.name}"
        if length > LONGEST_FUNCTION and name not in LONG_FUNCTIONS:
            names.append(f"{name} has {length} lines")
    return names


def full_folders(folders: list[Path]) -> list[str]:
    """Folders with more modules at their top level than one looks through."""
    names = []
    for folder in folders:
        for place in [
            folder,
            *(path for path in folder.rglob("*") if path.is_dir()),
        ]:
            modules = [
                file
                for file in place.glob("*.py")
                if file.name != "__init__.py"
            ]
            if len(modules) > MOST_MODULES:
                names.append(
                    f"{place.relative_to(ROOT)} has {len(modules)} modules"
                )
    return names


def rooms_of(folders: list[Path]) -> dict[str, list[Path]]:
    """The files of each room: a folder of the product, or of the trainer."""
    rooms = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            rooms.setdefault(
                file.parent.relative_to(ROOT).as_posix(), []
            ).append(file)
    return rooms


def main(names: list[str]) -> int:
    """Prints the figures of each room and of all; the status is 1 where they do not hold."""
    folders = [ROOT / name for name in names or PRODUCT]
    print(
        f"{'':28}{'lines':>7}{'density':>9}{'tuples':>8}{'compr.':>8}{'typed':>7}{'long':>7}"
    )
    total = Counts()
    troubles = full_folders(folders)
    for room, files in rooms_of(folders).items():
        counts = Counts()
        for file in files:
            counts.add(count(file))
            troubles += long_functions(file)
        total.add(counts)
        print(_row(room, counts))
    print(_row("all", total))
    troubles += total.troubles()
    for trouble in troubles:
        print(trouble)
    return 1 if troubles else 0


def _row(name: str, counts: Counts) -> str:
    return (
        f"{name:28}{counts.lines:7,}{counts.density:9.2f}{counts.tuple_share:8.1f}"
        f"{counts.comprehension_share:8.1f}{counts.annotated_share:7.0%}{counts.long_share:7.1%}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
