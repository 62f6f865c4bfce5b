"""Imports point downwards only, as the table in CONTRIBUTING.md says."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_hf"
BENCHMARKS = ROOT / "benchmarks"
ENTRY_POINTS = [ROOT / "run_clm_moe.py", *(ROOT / "scripts").glob("*.py"), *BENCHMARKS.rglob("*.py")]
FILES = sorted([*PACKAGE.rglob("*.py"), *ENTRY_POINTS])
MOST_LINES = 700

# These travel with every export, where nothing else of the package is.
TRAVELLING = (
    "configuration_moe",
    "router_rules",
    "routing",
    "router_selection",
    "router_losses",
    "kept_choices",
    "language_head",
    "linear_cross_entropy",
    "liger_cross_entropy",
    "modeling_outputs",
    "modeling_moe",
)
THEIR_PACKAGES = {"torch", "transformers", "huggingface_hub"}
# What they use where it is installed.
THEIR_OPTIONAL_PACKAGES = {"liger_kernel"}

# The face of the package shows the model; `python -m moe_hf` is the command line.
NOT_IN_THE_TABLE = {"moe_hf/__init__.py": 3, "moe_hf/__main__.py": 6}


def floors() -> dict[str, int]:
    """Read the table: a file, or a folder with a slash at its end, to its floor."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {path: int(floor) for floor, paths in rows for path in re.findall(r"`([^`]+)`", paths)}


FLOORS = floors()


def room_of(path: Path) -> tuple[str, int]:
    """Return the row of the table that a file belongs to, and its floor."""
    name = path.relative_to(ROOT).as_posix()
    if name in NOT_IN_THE_TABLE:
        return name, NOT_IN_THE_TABLE[name]
    rows = [row for row in FLOORS if name == row or (row.endswith("/") and name.startswith(row))]
    assert len(rows) == 1, f"{name} is not in the table of CONTRIBUTING.md, or is there {len(rows)} times"
    return rows[0], FLOORS[rows[0]]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCE_OF = {module_of(path): path for path in FILES}


def imported_modules(path: Path, source: str | None = None) -> list[str]:
    """List the full names of what a file imports anywhere, modules of the package as precisely as can be told."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .room import file` names a module, `from .room.file import name` does not.
            found += [full if (full := f"{module}.{alias.name}") in SOURCE_OF else module for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found += [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
    return found


def of_the_package(path: Path) -> list[Path]:
    return [SOURCE_OF[name] for name in imported_modules(path) if name in SOURCE_OF]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_what_is_imported_is_seen():
    """The walk itself: every form of an import, also inside of functions."""
    source = """
import torch.nn as nn, moe_hf.routing
from ..errors import UserError
from .. import __version__, presets
from . import gather
from .zero import x
def later():
    from moe_hf.data.build import y
    importlib.import_module("deepspeed.comm")
"""
    assert imported_modules(PACKAGE / "parallel" / "engine.py", source) == [
        "torch.nn",
        "moe_hf.routing",
        "moe_hf.errors",
        "moe_hf",
        "moe_hf.presets",
        "moe_hf.parallel.gather",
        "moe_hf.parallel.zero",
        "moe_hf.data.build",
        "deepspeed.comm",
    ]
    assert imported_modules(PACKAGE / "__init__.py", "from .routing import x") == ["moe_hf.routing"]


def test_table_names_what_there_is():
    assert len(FLOORS) >= 10 and set(FLOORS.values()) == set(range(7))
    assert all((ROOT / row).exists() for row in FLOORS)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_point_downwards(path):
    _, floor = room_of(path)
    for other in of_the_package(path):
        if other == PACKAGE / "__init__.py":
            # `from . import __version__`: a name that is there before anything else.
            assert floor > NOT_IN_THE_TABLE["moe_hf/__init__.py"]
            continue
        room, height = room_of(other)
        assert height <= floor, f"imports {room} of floor {height}, but is on floor {floor} itself"


def test_no_two_rooms_import_each_other():
    edges = {(room_of(path)[0], room_of(other)[0]) for path in FILES for other in of_the_package(path)}
    edges = {(room, other) for room, other in edges if room != other}
    assert len(edges) > 10
    while edges:
        # Take away the rooms that import no other; a cycle never becomes free.
        free = {other for _, other in edges} - {room for room, _ in edges}
        assert free, f"a cycle among {sorted({room for room, _ in edges})}"
        edges = {(room, other) for room, other in edges if other not in free}


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_need_nothing_but_each_other(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    tried = {node for one in ast.walk(tree) if isinstance(one, ast.Try) for node in ast.walk(one)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # The hub's loader understands `from .name import …` only.
            assert node.level == 1 and node.module in TRAVELLING, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            allowed = THEIR_PACKAGES | sys.stdlib_module_names | (THEIR_OPTIONAL_PACKAGES if node in tried else set())
            assert {module.partition(".")[0] for module in modules} <= allowed, ast.unparse(node)


@pytest.mark.parametrize("name", TRAVELLING)
def test_the_hubs_loader_asks_for_no_optional_package(name):
    assert not THEIR_OPTIONAL_PACKAGES & set(get_imports(PACKAGE / f"{name}.py"))


def test_plain_values_do_not_know_torch():
    for path in FILES:
        if room_of(path)[1] <= 1:
            assert "torch" not in {name.partition(".")[0] for name in imported_modules(path)}, path.name


def test_only_parallel_knows_deepspeed():
    def imports_deepspeed(path: Path) -> bool:
        return any(name.partition(".")[0] == "deepspeed" for name in imported_modules(path))

    # Benchmarks measure DeepSpeed itself.
    knowing = [path for path in FILES if imports_deepspeed(path) and BENCHMARKS not in path.parents]
    assert knowing and {path.parent for path in knowing} == {PACKAGE / "parallel"}


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
