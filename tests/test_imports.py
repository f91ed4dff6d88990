"""The floors of the house: arrows point down, the two wings do not know each other, the ground loads without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skyrl_train"

STOREYS: list[set[str]] = [
    {"errors"},
    {"types", "config", "storage"},
    {"batch", "data", "tracking"},
    {"models", "envs", "algorithms", "runtime"},
    {"engines", "learner"},
    {"generator", "weight_sync"},
    {"roles", "prompts", "invariants", "checkpoints", "doors", "evaluator"},
    {"rounds"},
    {"trainer", "sampling"},
    {"build"},
    {"entrypoints"},
]
"""From the ground up: a folder or file imports itself and what is below it, nothing beside it."""
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
LEARNER_WING, GENERATOR_WING = {"learner", "algorithms"}, {"generator", "engines", "envs", "data"}
ONE_FILE = {
    "ray": "runtime/ray_cluster.py",
    "sglang": "(nowhere: it is a server)",
    "vllm": "(nowhere: it is a server)",
    "hydra": "config/door.py",
}
INSIDE = "engines/sglang/inside/skyrl_tiles/"
WITHOUT_TORCH = ("types", "errors", "config", "data", "envs")


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    file: str
    line: int
    module: str
    late: bool
    """Inside a function, or for type checkers only."""

    @property
    def room(self) -> str:
        """``learner`` for learner/worker.py, ``batch`` for batch.py."""
        return self.file.split("/")[0].removesuffix(".py")

    @property
    def target(self) -> str | None:
        """The room it leads to, if it is one of ours."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = file.relative_to(PACKAGE).as_posix()
    at_load = set(_at_load(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and name.startswith(INSIDE):  # inside a server the package has another name
                continue
            assert node.level == 0, f"{name}:{node.lineno}: write the whole name of the module"
            modules = [f"{node.module}.{alias.name}" if node.module == PACKAGE.name else str(node.module)
                       for alias in node.names]  # fmt: skip
        else:
            continue
        for module in modules:
            yield Import(name, node.lineno, module, node not in at_load)


def _at_load(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_load(child)


IMPORTS = [found for file in sorted(PACKAGE.rglob("*.py")) for found in imports_of(file)]


def test_there_is_something_to_look_at() -> None:
    assert len(IMPORTS) > 500 and any(i.target == "learner" for i in IMPORTS)
    assert any(i.late for i in IMPORTS) and not all(i.late for i in IMPORTS)


def test_every_room_has_its_floor() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if (p.is_dir() and any(p.glob("*.py"))) or p.suffix == ".py"}
    assert rooms - {"__init__"} == set(FLOOR)


def test_arrows_point_down() -> None:
    up = [str(i) for i in IMPORTS if i.target and i.target != i.room and FLOOR[i.target] >= FLOOR.get(i.room, 0)]
    assert up == []


def test_the_wings_do_not_know_each_other() -> None:
    wings = ((LEARNER_WING, GENERATOR_WING), (GENERATOR_WING, LEARNER_WING))
    met = [str(i) for i in IMPORTS for mine, theirs in wings if i.room in mine and i.target in theirs]
    assert met == []


@pytest.mark.parametrize("package", ONE_FILE)
def test_a_foreign_world_has_one_door(package: str) -> None:
    through = [str(i) for i in IMPORTS if i.module.split(".")[0] == package and i.file != ONE_FILE[package]]
    assert through == []


def test_algorithms_are_functions_of_tensors() -> None:
    """No process groups, no other process, no files, no waiting."""
    banned = ("ray", "torch.distributed", "torch.multiprocessing", "multiprocessing", "asyncio", "pathlib", "os", "io")
    mine = [i for i in IMPORTS if i.room == "algorithms"]
    bad = [str(i) for i in mine if any(i.module == b or i.module.startswith(f"{b}.") for b in banned)]
    assert bad == []
    assert {i.target for i in mine if i.target} <= {"algorithms", "batch", "config", "errors"}


def test_no_file_is_loaded_by_what_it_loads() -> None:
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.target and not found.late:
            name = f"{PACKAGE.name}." + found.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            graph.setdefault(name, set()).add(found.module)
    assert len(list(TopologicalSorter(graph).static_order())) > 50  # raises CycleError


def modules(room: str) -> list[str]:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files)
    return [name for name in names if not name.endswith("__main__")]


def test_the_ground_loads_without_torch_and_transformers() -> None:
    """One fresh interpreter, in which both packages (and Ray) cannot be had."""
    wanted = [name for room in WITHOUT_TORCH for name in modules(room)]
    assert len(wanted) > 30
    wanted += [
        "skyrl_train.entrypoints.main_base",
        "skyrl_train.entrypoints.main_generate",
        "skyrl_train.entrypoints.cli",
    ]
    script = (
        "import importlib, sys\n"
        "for name in ('torch', 'transformers', 'ray'): sys.modules[name] = None\n"
        f"for name in {wanted}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: print(name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
