"""What the pages say is so: every command and every block of Python runs on a tiny model, tables are those of the
recorded results, links lead somewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from dynamic_llava.__main__ import main as command
from dynamic_llava.data.shapes import build_shapes
from dynamic_llava.rules import find_image_rule

from .eval.downloads import build_all
from .eval.generation_data import conversation, write_downloads
from .eval.wordnet import write_wordnet
from .pages import PAGES, ROOT, Block, anchors_of, blocks_of, commands_of

pytest.importorskip("lmms_eval")
pytest.importorskip("peft")

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    pytest.param(words, id=f"{block.place} {' '.join(words)}")
    for block in BLOCKS
    if block.language == "bash" and "not run" not in block.marks
    for words in commands_of(block)
]
# What stands for what a reader has.
HAS = {
    "RUN": "runs/shapes",
    "SRC": "runs/shapes",
    "LORA": "runs/lora",
    "DENSE": "runs/dense",
    "llava-hf/llava-1.5-7b-hf": "assets/tiny-llava",
    "/data/llava_v1_5_mix665k.json": "data/shapes/train.json",
    "/data/mix665k.json": "data/shapes/train.json",
    "/data/shards": "data/shards",
    "/data/llava": "data/shapes",
    "/data/more": "data",
}
SHAPES = "{seed: 0, train_pictures: 8, val_pictures: 1, test_pictures: 2}"
# Minutes become seconds, and a 7B the tiny base.
TRAIN = {
    "base_model": "assets/tiny-llava",
    "max_steps": "2",
    "per_device_train_batch_size": "4",
    "logging_steps": "1",
    "predictor_dim": "32",
    "predictor_num_heads": "2",
    "predictor_ffn_dim": "32",
    "min_output_length": "20",
    "use_cpu": "true",
    "restart": "true",
}
OF_7B = {"global_batch_size": "4", "bf16": "false", "deepspeed": "null", "dataloader_num_workers": "0"}
OF_SHAPES = {"shapes": SHAPES, "report_questions": "2", "report_descriptions": "1"}
EVAL = ["--limit", "2", "--batch-size", "2", "--device", "cpu"]
TIMED = ["--shape", "tiny"]
SMALL = {
    "compare": [],
    "report": ["--limit", "2", "--descriptions", "1", "--data-root", "data/shapes"],
    "flops": [],
    "measure": [
        *(*TIMED, "--prompt-lengths", "8", "--output-lengths", "12", "--steps", "2", "--repeats", "1", "--warmup", "1"),
        *("--batch-sizes", "1", "--full-batch-sizes", "1", "--no-cache-lengths", "4", "--modes", "prefill,decode"),
    ],
    "train": [*TIMED, "--repeats", "1"],
    "score": [*TIMED, "--repeats", "1", "--output-tokens", "8"],
    "inspect": [],
    "convert": ["--overwrite"],
    "merge": ["--overwrite"],
    "shapes": ["--train-pictures", "2", "--val-pictures", "1", "--test-pictures", "1"],
}


def smaller(words: list[str]) -> list[str]:
    """A command of a page with what the tests have in the place of what a reader has."""
    for there, here in HAS.items():
        words = [re.sub(rf"(?<![\w/.-]){re.escape(there)}(?![\w.-])", here, word) for word in words]
    words = ["new" if word == "DST" else word for word in words]
    name = re.sub(r"^(\w+=\S* )+", "", " ".join(words))
    if "--help" in words or "--version" in words:
        return words
    if "--dry-run" in words or name.startswith("dynamic-llava data check"):
        return with_keys(words, {"base_model": TRAIN["base_model"]})
    if name.startswith(("dynamic-llava train", "bash scripts/train_stage.sh")):
        return with_keys(words, {**TRAIN, **(OF_7B if "llava15_7b" in " ".join(words) else OF_SHAPES)})
    if name.startswith(("dynamic-llava eval", "bash scripts/eval.sh")):
        return [*words, *EVAL, *(() if "--data-root" in words else SHAPES_TASK)]
    if words[0] == "dynamic-llava":
        command = next(word for word in words[1:] if word in SMALL)
        if command == "shapes":
            words = [*words[: words.index("data/shapes")], "data/other", *words[words.index("data/shapes") + 1 :]]
        return [*words, *SMALL[command]]
    if name.startswith("python eval/build_generation_benchmarks.py"):
        return [*words, "--allow-fewer"]
    if name == "python scripts/readme_tables.py":
        return [*words, "--check"]
    return [*words, "--limit", "2"] if "lmms_eval" in words else words


# The paper's tasks are data of the hub; a suite of them is taken with another task on top.
SHAPES_TASK = ["--tasks", "shapes_vqa", "--data-root", "data/shapes"]


def with_keys(words: list[str], values: dict[str, str]) -> list[str]:
    """`words` with keys of a training on top."""
    kept = [word for word in words if "=" not in word or word.partition("=")[0] not in values]
    return [*kept, *(f"{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a reader's checkout: with data, a finished run, a LoRA folder and a dense evaluation in it."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("assets", "configs", "docs", "dynamic_llava", "eval", "scripts"):
        (desk / name).symlink_to(ROOT / name)
    sizes = {"train_pictures": 8, "val_pictures": 1, "test_pictures": 2}
    shapes = build_shapes(desk / "data/shapes", seed=0, **sizes)
    write_downloads(desk / "playground/data")
    (desk / "data/shards").mkdir()
    with tarfile.open(desk / "data/shards/a.tar", "w") as tar:
        for number, picture in enumerate(sorted((shapes / "images/train").iterdir())[:4]):
            sample = desk / "sample.json"
            sample.write_text(json.dumps(conversation(str(number), f"{number}.png", 60)))
            tar.add(sample, f"{number}.json")
            tar.add(picture, f"{number}.png")
    shutil.copy(desk / "playground/data/lvis.json", desk / "lvis_instruct4v_220k.json")
    shutil.copy(desk / "playground/data/sharegpt4v.json", desk / "sharegpt4v_instruct_gpt4-vision_cap100k.json")
    shutil.copy(shapes / "images/test/000000.png", desk / "picture.jpg")
    shutil.copy(shapes / "test_vqa.json", shapes / "my_vqa.json")
    build_all(desk / "playground/data/eval")
    for block in BLOCKS:
        if "file" in block.marks:
            (desk / block.marks["file"]).parent.mkdir(exist_ok=True)
            (desk / block.marks["file"]).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        train = importlib.import_module("dynamic_llava.train.__main__").main
        keys = [f"{key}={value}" for key, value in {**TRAIN, "shapes": SHAPES, "report": "false"}.items()]
        config = ["--config", "configs/train/shapes.yaml", *keys]
        assert train(config) == 0
        assert train([*config, "lora_r=2", "output_dir=runs/lora"]) == 0
        evaluate = importlib.import_module("dynamic_llava.eval.__main__").main
        arguments = ["--model", "assets/tiny-llava", *SHAPES_TASK, *EVAL, "--output", "runs/dense"]
        assert evaluate(arguments) == 0
        assert evaluate(["--model", "runs/shapes", *SHAPES_TASK, *EVAL]) == 0
    return desk


@pytest.fixture
def at_the_desk(desk, monkeypatch, tmp_path):
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    monkeypatch.setenv("GPUS", "0")
    return desk


@pytest.fixture(scope="module", autouse=True)
def wordnet(tmp_path_factory):
    import nltk

    folder = str(write_wordnet(tmp_path_factory.mktemp("nltk")))
    nltk.data.path.insert(0, folder)
    yield
    nltk.data.path.remove(folder)


RECORDER = """#!/bin/sh
case $1 in
    */check_environment.py) exit 0 ;;
    -m) printf '%s\\n' "$@" >"$RECORD" ;;
    *) exec "{python}" "$@" ;;
esac
"""


def words_of_script(words: list[str], folder: Path) -> list[str]:
    """The words with which a script of the shell would start Python at its end."""
    python, record = folder / "python", folder / "record"
    python.write_text(RECORDER.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PYTHON": str(python), "RECORD": str(record)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return record.read_text().splitlines()


def status_of(call, *arguments) -> int:
    """The exit status of a command, also where it ends the process."""
    try:
        return call(*arguments) or 0
    except SystemExit as end:
        return end.code or 0


def run(words: list[str], folder: Path, monkeypatch) -> int:
    """The exit status of a command line, in this process where it is Python's."""
    while re.match(r"\w+=", words[0]):
        name, _, value = words[0].partition("=")
        monkeypatch.setenv(name, value)
        words = words[1:]
    if words[0] == "bash":
        words = ["python", *words_of_script(words, folder)]
    program, *words = words
    if program == "dynamic-llava":
        return status_of(command, words)
    assert program == "python", f"no way to run {program!r}; mark the block as not run, and say why"
    if words[0] != "-m":
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.syspath_prepend(Path(words[0]).resolve().parent)
        return status_of(lambda: runpy.run_path(words[0], run_name="__main__") and 0)
    if words[1] == "lmms_eval":
        return subprocess.run([sys.executable, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    module = words[1].removesuffix(".__main__")
    if find_spec(f"{module}.__main__" if importlib.import_module(module).__path__ else module):
        module = f"{module}.__main__"
    return status_of(importlib.import_module(module).main, words[2:])


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_runs(words, at_the_desk, tmp_path, monkeypatch):
    assert run(smaller(words), tmp_path, monkeypatch) == 0


def test_modules_of_ones_own_are_found_by_the_installed_command_too(desk, monkeypatch):
    """Its script does not stand where the user does, as `python -m` would."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(desk))])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    with pytest.raises(ValueError, match="cannot be imported"):
        find_image_rule("my_module:Strongest", "topk")
    assert command(["--version"]) == 0
    assert type(find_image_rule("my_module:Strongest", "topk")).__name__ == "Strongest"


def python_of(page: Path) -> list[Block]:
    """The Python of a page that is run, behind that of the page which it continues."""
    own = [block for block in blocks_of(page) if block.language == "python" and "not run" not in block.marks]
    before = [python_of(page.parent / block.marks["continues"]) for block in own if "continues" in block.marks]
    return [*(block for blocks in before for block in blocks), *own]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_every_block_of_python_runs(page, at_the_desk):
    names: dict = {"__name__": page.stem, "FOLDER_OR_REPOSITORY": "runs/shapes"}
    for block in python_of(page):
        text = block.text
        for there, here in HAS.items():
            text = text.replace(f'"{there}"', f'"{here}"')
        exec(compile("\n" * block.line + text, str(block.page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} in {page}"
        assert not anchor or anchor in anchors_of(file), f"{target} in {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_from_these_tests(page):
    """Code stands in fences that say their language, and what is not run says why."""
    text = page.read_text()
    assert text.count("```") == 2 * len(blocks_of(page))
    for block in blocks_of(page):
        assert block.language in ("bash", "python", "text", "yaml", "json", "bibtex"), block.place
        assert len(block.marks.get("not run", "a reason")) >= 8, block.place
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^(?: {4}|\t)\S", outside, re.MULTILINE), "an indented block"


def test_blocks_are_found():
    page = ROOT / "page.md"
    text = (
        "a\n\n<!-- not run: it costs money -->\n```bash\nrm x  # all\nA=1 b \\\n  --c 'd e'\n```\n\n```python\n1\n```\n"
    )
    shell, python = blocks_of(page, text)
    assert (shell.marks, shell.place) == ({"not run": "it costs money"}, "page.md:4")
    assert commands_of(shell) == [["rm", "x"], ["A=1", "b", "--c", "d e"]]
    assert (python.language, python.text, python.marks) == ("python", "1\n", {})


def test_tables_are_up_to_date():
    script = ROOT / "scripts" / "readme_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_that_differs_is_found(tmp_path, monkeypatch, capsys):
    tables = runpy.run_path(str(ROOT / "scripts" / "readme_tables.py"))
    for page in tables["PAGES"]:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    tables["main"].__globals__["ROOT"] = tmp_path
    assert tables["main"](["--check"]) == 0
    page = tmp_path / "docs/efficiency.md"
    page.write_text(page.read_text().replace("0.44", "0.43"))
    assert tables["main"](["--check"]) == 1
    assert "docs/efficiency.md differs" in capsys.readouterr().err
    assert tables["main"]([]) == 0
    assert page.read_text() == (ROOT / "docs/efficiency.md").read_text()
