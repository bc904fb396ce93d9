"""A checkpoint brings the code that loads it, and the installed package is taken where there is one."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaModel
from dynamic_llava.carried_code import AUTO_MAP, without_code
from dynamic_llava.checkpoints import load_processor
from dynamic_llava.checkpoints.convert import convert

from .test_imports import NAME, PACKAGE, STDLIB, ground_floor
from .tiny import tiny_model

ROOT = Path(__file__).parent.parent
BASE = "assets/tiny-llava"
TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture in detail."}]}]
CALL = {"max_new_tokens": 12, "do_sample": False, "image_keep_rate": 0.25}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Runs in a process of its own: what a user without this package would write.
ALONE = """
import json, sys
sys.modules["dynamic_llava"] = None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
name, again, talk, call = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
picture = Image.new("RGB", (96, 64), "red")

def ask(folder, auto=AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    output = model.generate(**processor(images=picture, text=prompt, return_tensors="pt"), **call, return_sparsity=True)
    kept = output.sparsity.image_tokens_kept.tolist()
    return model, processor, {"tokens": output.sequences.tolist(), "kept": kept}

config = AutoConfig.from_pretrained(name, trust_remote_code=True)
named = config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
answers = [ask(name, auto)[2] for auto in (AutoModelForMultimodalLM, AutoModelForImageTextToText)]
model, processor, _ = ask(name)
model.save_pretrained(again)
processor.save_pretrained(again)
answers.append(ask(again)[2])
headless = type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__
turns = [{"role": "user", "content": [{"type": "image", "image": picture}, talk[0]["content"][1]]}]
pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
said = pipe(text=turns, return_full_text=False, generate_kwargs=call)[0]["generated_text"]
print(json.dumps({"answers": answers, "named": named, "headless": headless, "said": said,
    "homes": sorted({type(item).__module__.split(".")[0] for item in (config, model, model.config)})}))
"""


def run_script(script: str, *arguments, tmp_path: Path, **environment) -> dict:
    """What a Python script prints as JSON, in another folder and without a path to this package."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**kept, **offline, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny base as a Dynamic-LLaVA with predictors, and its processor, written by `convert`."""
    folder = tmp_path_factory.mktemp("carried")
    torch.manual_seed(0)
    DynamicLlavaForConditionalGeneration.from_pretrained(BASE).save_pretrained(folder / "new")
    load_processor(BASE).save_pretrained(folder / "new")
    convert(folder / "new", folder / "converted", "ours", say=lambda line: None)
    return folder / "converted"


def modules_of(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def test_saving_and_converting_carry_the_ground_floor(converted):
    expected = {name.partition(".")[2] for name in ground_floor()}
    for folder in (converted, converted.parent / "new"):
        assert modules_of(folder) == expected
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in expected:
            assert (folder / f"{name}.py").read_bytes() == (PACKAGE / f"{name}.py").read_bytes()


@pytest.mark.parametrize("module", ground_floor())
def test_no_module_asks_for_a_package_that_transformers_does_not_bring(module):
    # What transformers looks at before it takes code from the hub.
    needed = set(get_imports(PACKAGE / f"{module.partition('.')[2]}.py")) - STDLIB
    assert needed <= {"torch", "transformers", "safetensors", "typing_extensions"}


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_process_without_the_package_answers_as_the_package(converted, tmp_path, place):
    name, environment = str(converted), {}
    if place == "hub":
        # As downloaded: transformers then fetches the modules one by one.
        name, cache = "someone/some-llava", tmp_path / "hub" / "models--someone--some-llava"
        shutil.copytree(converted, cache / "snapshots" / COMMIT)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
        environment = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = (name, tmp_path / "again", json.dumps(TALK), json.dumps(CALL))
    found = run_script(ALONE, *arguments, tmp_path=tmp_path, **environment)

    model, processor = DynamicLlavaForConditionalGeneration.from_pretrained(converted), load_processor(converted)
    prompt = processor.apply_chat_template(TALK, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (96, 64), "red"), text=prompt, return_tensors="pt")
    output = model.generate(**inputs, **CALL, return_sparsity=True)
    expected = {"tokens": output.sequences.tolist(), "kept": output.sparsity.image_tokens_kept.tolist()}
    assert expected["kept"] == [16]
    assert found["answers"] == [expected] * 3
    assert found["named"]
    assert found["headless"] == "DynamicLlavaModel"
    assert found["homes"] == ["transformers_modules"]
    said = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["said"].strip() == said.strip()
    assert modules_of(tmp_path / "again") == modules_of(converted)


WINNER = """
import json, sys
name, carried_first = sys.argv[1], sys.argv[2] == "True"
if carried_first:
    sys.modules["dynamic_llava"] = None
from transformers import AutoModel, AutoModelForImageTextToText
if carried_first:
    first = type(AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)).__module__
    assert first.startswith("transformers_modules."), first
    del sys.modules["dynamic_llava"]
    import dynamic_llava
loaded = [auto.from_pretrained(name, trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoModel)]
print(json.dumps([type(item).__module__ for model in loaded for item in (model, model.config)]))
"""


@pytest.mark.parametrize("carried_first", [False, True])
def test_the_installed_package_wins(converted, tmp_path, carried_first):
    found = run_script(WINNER, converted, carried_first, tmp_path=tmp_path, PYTHONPATH=str(ROOT))
    assert {home.partition(".")[0] for home in found} == {NAME}


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_package_loads_what_names_code_as_before(converted, trust):
    arguments = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(converted, **arguments)) is DynamicLlavaConfig
    assert type(AutoModel.from_pretrained(converted, **arguments)) is DynamicLlavaModel
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(converted, **arguments)) is DynamicLlavaForConditionalGeneration


def test_a_configuration_names_the_code_that_lies_beside_it_and_no_other(converted, tmp_path):
    model = DynamicLlavaForConditionalGeneration.from_pretrained(converted)
    assert model.config.auto_map == AUTO_MAP
    model.config.save_pretrained(tmp_path / "config")
    stored = json.loads((tmp_path / "config" / "config.json").read_text())
    assert stored["auto_map"] == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert "configuration_dynamic_llava" in modules_of(tmp_path / "config")
    assert "modeling_dynamic_llava" not in modules_of(tmp_path / "config")
    with without_code(model.config, model):
        model.save_pretrained(tmp_path / "bare")
    assert "auto_map" not in json.loads((tmp_path / "bare" / "config.json").read_text())
    assert not modules_of(tmp_path / "bare")
    # In a folder with code, what carries none does not name it either.
    with without_code(model.config):
        model.config.save_pretrained(converted.parent / "new")
    assert "auto_map" not in json.loads((converted.parent / "new" / "config.json").read_text())
    model.save_pretrained(tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("layout", ["llava-hf", "published"])
def test_other_layouts_name_no_code(converted, tmp_path, layout):
    convert(converted, tmp_path / "other", layout, say=lambda line: None)
    assert "auto_map" not in json.loads((tmp_path / "other" / "config.json").read_text())
    assert not modules_of(tmp_path / "other")


def test_keep_rates_of_a_generation_configuration_go_with_the_checkpoint(tmp_path):
    model = tiny_model()
    model.generation_config.image_keep_rate = 0.5
    model.save_pretrained(tmp_path / "rate")
    read = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "rate").generation_config
    assert read.image_keep_rate == 0.5
    convert(tmp_path / "rate", tmp_path / "converted", "ours", say=lambda line: None)
    assert GenerationConfig.from_pretrained(tmp_path / "converted").image_keep_rate == 0.5


def test_a_pipeline_by_folder_with_the_package(converted):
    pipe = pipeline("image-text-to-text", model=str(converted))
    assert type(pipe.model) is DynamicLlavaForConditionalGeneration
    picture, question = Image.new("RGB", (96, 64), "red"), TALK[0]["content"][1]
    turns = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    (found,) = pipe(text=turns, return_full_text=False, generate_kwargs=CALL)
    prompt = pipe.processor.apply_chat_template(TALK, add_generation_prompt=True)
    inputs = pipe.processor(images=picture, text=prompt, return_tensors="pt")
    output = pipe.model.generate(**inputs, **CALL)[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"].strip() == pipe.processor.decode(output, skip_special_tokens=True).strip()


def test_a_model_of_ones_own_on_ours_brings_its_own_module(tmp_path, monkeypatch):
    source = "from dynamic_llava import DynamicLlavaForConditionalGeneration\n\n\n"
    (tmp_path / "my_llava.py").write_text(f"{source}class MyLlava(DynamicLlavaForConditionalGeneration):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_llava").MyLlava(tiny_model().config)
    for _ in range(2):
        mine.save_pretrained(tmp_path / "mine")
        stored = json.loads((tmp_path / "mine" / "config.json").read_text())["auto_map"]
        assert stored["AutoModelForImageTextToText"] == "my_llava.MyLlava"
        assert modules_of(tmp_path / "mine") >= {"my_llava"}
        assert all((tmp_path / "mine" / f"{name.partition('.')[0]}.py").exists() for name in stored.values())
