"""One configuration system: files by name or path, words on top, values of the right type, and the saved file again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import yaml

from dynamic_llava import commands
from dynamic_llava.config import Command, option, save
from dynamic_llava.config.words import find_config
from dynamic_llava.eval.__main__ import COMMAND as EVAL
from dynamic_llava.files import shipped
from dynamic_llava.train.config import load_config, read_values, resolve

ROOT = Path(__file__).parent.parent


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Keys:
    """Some keys.

    Args:
        name: text,
            on two lines.
    """

    place: str = option(help="where", positional=True)
    name: str = "a"
    count: int = option(1, "how many", "[0, inf)")
    rate: float | None = option(None, "a fraction", "(0, 1]")
    sizes: list[int] = option((1, 8), "numbers", "[1, inf)", commas=True)
    files: list[str] = option((), "paths")
    switch: bool = False
    on: bool = True
    maybe: bool | None = None
    mode: str = option("slow", "how", choices=("slow", "fast"))
    colour: Colour | str = "red"
    table: dict[str, int] | str | None = None


COMMAND = Command("keys", "Keys.", (Keys,))


def read(*words: str) -> Keys:
    return COMMAND.parse(["here", *words])[0]


SPELLINGS = [
    (["--count=3"], "count", 3),
    (["--count", "3"], "count", 3),
    (["count=3"], "count", 3),
    (["--count", "3.0"], "count", 3),
    (["--count", "1e3"], "count", 1000),
    (["count=null"], "count", 1),
    (["--rate", ".5"], "rate", 0.5),
    (["rate=1"], "rate", 1.0),
    (["rate='0.5'"], "rate", 0.5),
    (["--sizes", "1,2"], "sizes", [1, 2]),
    (["sizes=1, 2"], "sizes", [1, 2]),
    (["--sizes=[4, 5]"], "sizes", [4, 5]),
    (["sizes=7"], "sizes", [7]),
    (["--files", "a", "--count", "2"], "files", ["a"]),
    (["files=[a, b:0.5]"], "files", ["a", "b:0.5"]),
    (["files=*.tar"], "files", ["*.tar"]),
    (["--switch"], "switch", True),
    (["--switch", "false"], "switch", False),
    (["switch=True"], "switch", True),
    (["--no-on"], "on", False),
    (["--no_on"], "on", False),
    (["no-on=true"], "on", False),
    (["--no-maybe"], "maybe", False),
    (["--maybe"], "maybe", True),
    (["--mode", "fast"], "mode", "fast"),
    (["colour=blue"], "colour", "blue"),
    (["table={a: 1}"], "table", {"a": 1}),
    # Words are words, and text stays as it was written.
    (["name=no"], "name", "no"),
    (["name=on"], "name", "on"),
    (["name=12:30"], "name", "12:30"),
    (["name=007"], "name", "007"),
    (["name=1e3"], "name", "1e3"),
    (["name=true"], "name", "true"),
    (["--name", "@me"], "name", "@me"),
    (["--name", "-x"], "name", "-x"),
    (["name='null'"], "name", "null"),
    (["name=a=b"], "name", "a=b"),
    ([" name =b"], "name", "b"),
]


@pytest.mark.parametrize(("words", "key", "value"), SPELLINGS, ids=lambda value: str(value))
def test_a_value_in_every_spelling(words, key, value, tmp_path):
    found = getattr(read(*words), key)
    assert found == value
    assert type(found) is type(value)
    # And what is saved is read as the same again, by a file alone.
    save(tmp_path, read(*words))
    again = COMMAND.parse(["--config", str(tmp_path / "config.yaml")])[0]
    assert dataclasses.asdict(again) == dataclasses.asdict(read(*words))


WRONG = [
    (["cuont=3"], "Unknown key 'cuont'. Did you mean count"),
    (["--cuont", "3"], "Unknown key '--cuont'. Did you mean count"),
    (["-c"], "Unknown option '-c'"),
    (["--count"], "--count needs a value"),
    (["--count", "--rate", "1"], "--count needs a value"),
    (["count="], "count is empty"),
    (["count=2.5"], "count must be a whole number of at least 0, got 2.5"),
    (["count=-1"], "count must be a whole number of at least 0, got -1"),
    (["count=true"], "count must be a whole number"),
    (["count=1,2"], "count must be a whole number"),
    (["count=[1]"], "count takes one value"),
    (["count={a: 1}"], "got the mapping"),
    (["count=99999999999"], "at most 2147483647"),
    (["--rate=0"], "--rate must be a number in (0, 1], got 0"),
    (["rate=.nan"], "rate must be a number in (0, 1], got nan"),
    (["rate=nan"], "rate must be a number in (0, 1], got 'nan'"),
    (["sizes=1,,2"], "sizes must be values such as a,b"),
    (["sizes=1,0"], "sizes must be a whole number of at least 1, got '0'"),
    (["sizes=[]"], "sizes takes one value or several"),
    (["files=[a"], "files=[a"[:5]),
    (["switch=yes"], "switch must be true or false, got 'yes'"),
    (["switch=1"], "switch must be true or false, got 1"),
    (["--no-switch=maybe"], "--no-switch must be true or false"),
    (["--no-count"], "Unknown key '--no-count'"),
    (["mode=fats"], "mode must be one of slow, fast, got 'fats'"),
    (["colour=green"], "colour must be one of red, blue, got 'green'"),
    (["name=' '"], "name must be text that is not empty"),
    (["name=[a]"], "name takes one value"),
    (["there"], "Cannot read 'there'; write key=value"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value))
def test_what_is_wrong_is_named_as_it_was_written(words, message):
    with pytest.raises(ValueError) as error:
        read(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 3", "Unknown key 'cuont' in {}. Did you mean count"),
        ("count: many", "{}: count must be a whole number of at least 0, got 'many'"),
        ("name: 7", "{}: name must be text, got 7; put text that looks like a number or a switch in quotes"),
        ("name: true", "{}: name must be text, got true"),
        ("files: [a, 5]", "{}: files must be text, got 5"),
        ("no-on: 5", "{}: no-on must be true or false"),
        ("count: 3", "place is missing in {}"),
        ("- a", "{} must hold 'key: value' lines"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(text, message, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        COMMAND.parse(["--config", str(path)])
    assert message.format(path) in str(error.value)


def test_the_command_line_is_on_top_of_the_file(tmp_path):
    (tmp_path / "keys.yaml").write_text("place: there\ncount: 5\nno-on: true\nsizes: 3,4\nfiles: a\n")
    for words in (["--config", "keys.yaml"], ["--config=keys.yaml"], ["config=keys.yaml"]):
        words = [word.replace("keys.yaml", str(tmp_path / "keys.yaml")) for word in words]
        found = COMMAND.parse([*words, "count=6"])[0]
        assert (found.place, found.count, found.on, found.sizes, found.files) == ("there", 6, False, [3, 4], ["a"])
        assert COMMAND.parse([*words, "count=null"])[0].count == 1


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_presets_by_name_and_by_path_from_everywhere(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = sorted((ROOT / "configs" / kind).glob("*.yaml"))
    assert there
    for path in there:
        assert find_config(path.stem, kind) == find_config(f"configs/{kind}/{path.name}", kind) == path
    with pytest.raises(FileNotFoundError, match=there[0].stem):
        find_config(there[0].stem + "x", kind)
    # A file of the user comes before one of ours, a folder of that name does not.
    (tmp_path / there[0].stem).mkdir()
    assert find_config(there[0].stem, kind) == there[0]
    (tmp_path / there[1].stem).write_text("a: 1")
    assert find_config(there[1].stem, kind) == Path(there[1].stem)


def test_what_the_package_ships_stands_behind_what_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("assets/tiny-llava") == ROOT / "assets/tiny-llava"
    for path in ("assets/none", "tests/tiny.py", "../assets/tiny-llava", "", "configs/../pyproject.toml"):
        assert shipped(path) == Path(path)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/tiny-llava").write_text("")
    assert shipped("assets/tiny-llava") == Path("assets/tiny-llava")


def test_training_from_everywhere(tmp_path, monkeypatch):
    """A preset, its base and a DeepSpeed file, and what is saved of it."""
    monkeypatch.chdir(tmp_path)
    words = ["deepspeed=configs/deepspeed/zero2.json", "use_cpu=true", "report=false", "report_questions=null"]
    config = load_config("shapes", [*words, "report_descriptions=null"])
    assert config.training.deepspeed["zero_optimization"]["stage"] == 2
    config.save("run")
    assert load_config("run/train_config.yaml").values == config.values


@pytest.mark.parametrize(
    "words",
    [
        ["image_keep_rate=[0.1, 0.5]"],
        ["--lora-r", "4", "--lora_alpha=8"],
        ["keep_rate_schedule=cosine", "keep_rate_ramp=0.3"],
        ["lr_scheduler_type=linear", "optim=sgd"],
        ["save_strategy=no", "--disable-tqdm"],
        ["train_file=[a.json, b.json:0.5]"],
        ["lr_scheduler_kwargs={num_cycles: 1}"],
    ],
)
def test_check_and_dry_run_read_what_training_reads(words):
    from dynamic_llava.train.check import COMMAND as CHECK
    from dynamic_llava.train.keys import COMMAND as TRAIN

    words = [*words, "use_cpu=true"]
    training = resolve(read_values(["--config", "shapes", *words], TRAIN))
    planned = resolve(read_values(["--dry-run", "--config", "shapes", *words], TRAIN))
    checked = resolve(read_values(["shapes", "--json", *words], CHECK))
    assert training.values == planned.values == checked.values


@pytest.mark.parametrize("words", [["image_keep_rate=2"], ["lora_r=-1"], ["lora_alpha=8"], ["no_such=1"], ["fsdp=x"]])
def test_check_and_dry_run_refuse_what_training_refuses(words, capsys):
    found = []
    for name, more in (("train", ["--config", "shapes"]), ("train", ["--config", "shapes", "--dry-run"])):
        assert commands.load(name).main([*more, *words]) == 2
        found.append(capsys.readouterr().err)
    assert commands.load("data").main(["check", "shapes", *words]) == 2
    found.append(capsys.readouterr().err.replace("data check", "train"))
    assert len(set(found)) == 1, found


def test_a_suite_is_read_again(tmp_path):
    first = EVAL.parse(["--config", "quick", "--model", "m", "--output", "o", "--no-output-sparsity"])[0]
    save(tmp_path, first)
    assert EVAL.parse(["--config", str(tmp_path / "config.yaml")])[0] == first
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["output_sparsity"] is False
    # As earlier versions wrote it.
    (tmp_path / "old.yaml").write_text("no_output_sparsity: true\ntasks: gqa,pope\nmodel: m\n")
    old = EVAL.parse(["--config", str(tmp_path / "old.yaml")])[0]
    assert (old.output_sparsity, old.tasks) == (False, ["gqa", "pope"])


HELPS = [["--help"], ["--version"], *([name, "--help"] for name in commands.COMMANDS)]
HELPS += [[*words.split(), "-h"] for words in ("data check", "data shapes", "efficiency flops", "efficiency measure")]
HELPS += [[*words.split(), "--help"] for words in ("checkpoints convert", "eval compare", "train --config shapes")]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """What pip installs, with a look at what was imported."""
    path = tmp_path_factory.mktemp("bin") / "dynamic-llava"
    path.write_text(
        "import sys\n"
        "from dynamic_llava.__main__ import main\n"
        "try: status = main()\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lmms_eval', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else status)\n"
    )
    return path


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_needs_no_torch(script, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("usage: dynamic-llava", "dynamic-llava"))


def test_the_help_has_every_key(capsys):
    with pytest.raises(SystemExit):
        COMMAND.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    expected = (
        *("place where (needed)", "--name TEXT text, on two lines (default: a)", "--count N how many (at least 0"),
        *("--sizes N numbers (at least 1; default: 1,8)", "--no-on", "--switch", "slow|fast how (default: slow)"),
    )
    for words in expected:
        assert words in shown


def test_a_command_called_by_name(capsys):
    assert commands.load("efficiency").main(["flops", "--shape", "tiny", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")
    with pytest.raises(ValueError, match=r"Unknown command 'tarin'. Did you mean train"):
        commands.choose("", "", {name: entry.help for name, entry in commands.COMMANDS.items()}, ["tarin"])
