"""The house: the ground floor is flat and needs torch and transformers alone, floors import downwards, and no module
imports itself by a detour, inside folders either."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynamic_llava"
NAME = PACKAGE.name

# Folders, and modules beside the ground floor, from below; what stands together needs nothing of one another.
FLOORS = (
    {"errors", "files", "lazy", "packages", "screen"},
    {"config"},
    {"commands", "machine", "selection", "backbones"},
    {"checkpoints"},
    {"data"},
    {"visualize", "efficiency"},
    {"eval", "train", "app"},
    {"__main__"},
)
UPPER = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
# What a checkpoint that brings its code may ask for; transformers requires safetensors.
GROUND_PACKAGES = {"torch", "transformers", "safetensors", "triton", "typing_extensions"}
STDLIB = __import__("sys").stdlib_module_names


def modules() -> dict[str, Path]:
    """All modules of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join([NAME, *(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)])] = path
    return found


MODULES = modules()


def floor(module: str) -> int:
    """0 for the ground floor."""
    return UPPER.get(module.split(".")[1], 0)


def imports(module: str, lazy: bool) -> set[str]:
    """Modules of the package, and other packages, that `module` imports; `lazy` ones stand inside functions."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in _nodes(ast.parse(path.read_text()), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            inner = {f"{target}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {target}
    return found


def _nodes(tree: ast.AST, lazy: bool):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        yield child
        yield from _nodes(child, lazy)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    if module == f"{NAME}.__init__":
        return
    for target in imports(module, lazy=True):
        if target in MODULES:
            beside = target.split(".")[1] == module.split(".")[1] or floor(target) == floor(module) == 0
            assert beside or floor(target) < floor(module), f"{module} imports {target}, which does not lie below it"


def test_no_module_imports_itself_by_a_detour():
    graph = {name: {t for t in imports(name, lazy=True) if t in MODULES and t != name} for name in MODULES}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for target in graph[name]:
                walk(target, (*way, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def ground_floor() -> list[str]:
    return [name for name, path in MODULES.items() if path.parent == PACKAGE and not floor(name) and "__" not in name]


@pytest.mark.parametrize("module", ground_floor())
def test_the_ground_floor_needs_torch_and_transformers_alone(module):
    others = {name.split(".")[0] for name in imports(module, lazy=True)} - {NAME, "__future__"}
    assert others - STDLIB <= GROUND_PACKAGES, f"{module} imports {others - STDLIB - GROUND_PACKAGES}"
    text = MODULES[module].read_text()
    # transformers finds what a checkpoint's code needs by these lines, and knows no other spelling.
    assert "from . import" not in text, f"{module} has 'from . import'; write 'from .module import name'"


def test_functional_imports_torch_alone():
    assert imports(f"{NAME}.functional", lazy=True) == {"__future__", "torch"}


LIMITS = {"modeling_sparse_decoder.py": 300, "modeling_dynamic_llava.py": 300}


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= LIMITS.get(path.name, 250)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
