"""The wheel alone, in an environment without the checkout and a folder without a file: everything works by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from dynamic_llava.commands import COMMANDS

ROOT = Path(__file__).parent.parent


def test_every_folder_of_the_package_is_in_the_wheel():
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dynamic_llava").rglob("*.py")}
    # Its file is read by lmms-eval as one beside the task YAML, and is data of the package.
    folders -= {Path("dynamic_llava/eval/tasks")}
    packages = {".".join(folder.parts) for folder in folders}
    assert {*settings["packages"]} == packages | {"dynamic_llava.configs", "dynamic_llava.assets"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    # Built from a copy: setuptools leaves build/ behind.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dynamic_llava", "configs", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_presets_tasks_figures_and_the_tiny_base(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dynamic_llava/")}
    expected = {
        f"dynamic_llava/{path.relative_to(ROOT / top) if top == 'dynamic_llava' else path.relative_to(ROOT)}"
        for top in ("dynamic_llava", "configs", "assets")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert "dynamic_llava/py.typed" in names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and the packages of this one but for the project."""
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    places = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Behind the environment's own; what is installed there as a link to this checkout is not followed.
    (next((home / "lib").glob("python*")) / "site-packages" / "others.pth").write_text("\n".join(places))
    return home / "bin" / "dynamic-llava"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")

    def call(*words: str, status: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(
            [installed, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout if status == 0 else done.stderr

    call.folder = folder
    return call


def test_what_the_command_says_of_itself(run):
    version = run("--version").split()
    assert version[0] == "dynamic-llava"
    assert version[1][0].isdigit()
    listed = run()
    for name in COMMANDS:
        assert name in listed
    for name in COMMANDS:
        assert run(name, "--help").startswith(f"usage: dynamic-llava {name} ")
    assert "Did you mean efficiency?" in run("eficiency", status=2)
    assert not list(run.folder.iterdir())


def test_every_command_works_from_an_empty_folder(run):
    pytest.importorskip("lmms_eval")
    small = ["max_steps=2", "save_strategy=no", "use_cpu=true", "disable_tqdm=true"]
    assert "TFLOPs" in run("efficiency", "flops", "--shape", "13b")
    assert "llava" in run("checkpoints", "inspect", "assets/tiny-llava")
    run("train", "--config", "smoke_cpu", *small)
    assert "one picture" in run("data", "check", "smoke_cpu", *small)
    suite = ["--tasks", "shapes_vqa", "--data-root", "data/smoke", "--limit", "2"]
    run("eval", "--model", "runs/smoke", *suite)
    run("compare", "runs/smoke/eval")
    results = run.folder / "runs/smoke/eval"
    assert json.loads((results / "results.json").read_text())["options"]["limit"] == 2
    assert (results / "compare.html").is_file()
    saved = yaml.safe_load((results / "config.yaml").read_text())
    assert (saved["model"], saved["tasks"], saved["limit"]) == ("runs/smoke", ["shapes_vqa"], 2)
