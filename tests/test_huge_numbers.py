"""Numbers that no float holds, as JSON and YAML may have them: refused wherever a number is read."""

from __future__ import annotations

import json

import pytest
import yaml

from dynamic_llava import DynamicLlavaConfig, SparsityConfig
from dynamic_llava.config.fields import Key
from dynamic_llava.eval.compare_runs import load_runs
from dynamic_llava.train.config import load_config
from tools.tiny_base.config import load_config as load_tiny_base

from .tiny import tiny_config

HUGE = [10**400, -(10**400)]


@pytest.mark.parametrize("huge", HUGE)
def test_sparsity(huge):
    for name in ("budget_weight", "pruned_probe_rate", "min_output_length", "predictor_dim"):
        with pytest.raises(ValueError, match=name):
            SparsityConfig(**{name: huge})
    with pytest.raises(ValueError, match="untrained"):
        SparsityConfig(untrained=[[huge]])


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("entry", ["text_config.hidden_size", "vision_config.num_channels", "vision_config.patch_size"])
def test_models(entry, huge):
    values = json.loads(json.dumps(tiny_config().to_dict()))
    part, name = entry.split(".")
    values[part][name] = huge
    with pytest.raises(ValueError, match=name):
        DynamicLlavaConfig.from_dict(values)


@pytest.mark.parametrize("huge", HUGE)
def test_options(huge):
    for kind, interval in ((float, None), (float, "(0, inf)"), (int, "[0, inf)"), (int, None)):
        with pytest.raises(ValueError, match="a must be"):
            Key("a", (kind,), None, "", interval).checked(huge, "a")


@pytest.mark.parametrize("huge", HUGE)
def test_training(huge, tmp_path):
    path = tmp_path / "run.yaml"
    for name in ("seed", "learning_rate", "lora_dropout", "max_steps", "max_length"):
        path.write_text(yaml.safe_dump({"base_model": "b", "train_file": "t", "image_folder": "i", name: huge}))
        with pytest.raises(ValueError, match=name):
            load_config(path)
    path.write_text(yaml.safe_dump({"decoder": {"description_share": huge}}))
    with pytest.raises(ValueError, match="description_share"):
        load_tiny_base(path)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("place", ["metrics", "efficiency"])
def test_results(place, huge, tmp_path):
    results = {"model": "m", "metrics": {}, "settings": {}, "options": {}, place: {"gqa": {"exact_match": huge}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"{place} is"):
        load_runs([tmp_path])


@pytest.mark.parametrize("huge", HUGE)
def test_documents(huge):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lmms_eval")
    from dynamic_llava.eval.local.documents import image_dataset

    assert datasets
    with pytest.raises(ValueError, match="do not fit into one table"):
        image_dataset([{"image": "a.png", "answer": huge}])
