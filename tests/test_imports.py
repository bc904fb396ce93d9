"""Imports point down only (DESIGN, section 3), and the functional core imports torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynamic_llava"

# Layer of each module or folder; a module may import from its own layer and from lower ones.
LAYERS = {
    "functional": 0,
    "token_spans": 0,
    "slots": 0,
    "storage": 0,
    "chat_template": 0,
    "files": 0,
    "values": 0,
    "errors": 0,
    "model_kinds": 0,
    "parameter_names": 0,
    "config_checks": 0,
    "weight_files": 1,
    "generation_file": 1,
    "weight_checks": 2,
    "cli": 0,
    "packages": 0,
    "model_card": 0,
    "compat": 0,
    "configuration_dynamic_llava": 1,
    "predictors": 2,
    "blocked_attention": 1,
    "triton_attention": 1,
    "masked_kernels": 2,
    "attention": 2,
    "cache": 2,
    "cache_layers": 1,
    "projector": 2,
    "options": 2,
    "decisions": 3,
    "call_inputs": 4,
    "outputs": 3,
    "statistics": 4,
    "padding": 3,
    "generation_record": 0,
    "generation": 5,
    "loading": 3,
    "modeling_dynamic_llama": 4,
    "modeling_dynamic_llava": 6,
    "selection": 6,
    "checkpoints": 6,
    "__init__": 7,
    "data": 8,
    "efficiency": 8,
    "eval": 9,
    "train": 10,
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of the package that a module imports, at any depth of the file."""
    package = ["dynamic_llava", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            names = [full] if node.module else [[*full, alias.name] for alias in node.names]
            if full == ["dynamic_llava"] and node.level == 0:
                names = [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        for name in names:
            if name[0] == "dynamic_llava":
                target = name[1] if len(name) > 1 else "__init__"
                found.add(target if target in LAYERS else "__init__")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    assert own in LAYERS, f"{own} has no layer in this test"
    for target in imported_parts(path) - {own}:
        assert LAYERS[target] <= LAYERS[own], f"{own} imports {target}, which lies above it"


def test_functional_imports_torch_alone():
    roots = set()
    for node in ast.walk(ast.parse((PACKAGE / "functional.py").read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots == {"__future__", "torch"}
