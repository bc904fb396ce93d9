"""The card of a saved model: valid for the hub, and true to what its base, its sparsity and its evaluations say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import save_adapter
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.model_card import write_model_card

from .tiny import tiny_config, tiny_model


def card_in(folder: Path) -> ModelCard:
    """The card of a folder, whose first lines the hub takes."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    data = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert ModelCardData(**data).to_dict() == card.data.to_dict()
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "dynamic-llava" in card.data.tags
    assert "@inproceedings{huang2025dynamicllava," in card.text
    return card


def base_folder(folder: Path, card: str | None, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (None, {}, {}),
        ("# A card without first lines\nlicense: mit\n", {}, {}),
        ("---\nlibrary_name: transformers\n---\n", {}, {}),
        ("---\nlicense: llama2\n---\n", {}, {"license": "llama2"}),
        ("---\nlicense: 'llama2'\ntags:\n- x\n---\n\n# Text", {"license": "mit"}, {"license": "llama2"}),
        (None, {"license": "mit"}, {"license": "mit"}),
        (None, {"license": 3}, {}),
        (
            "---\r\nlicense: other\r\nlicense_name: mine\r\nlicense_link: LICENSE\r\n---\r\n",
            {},
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        (
            "---\nlicense: apache-2.0\nbase_model:\n  - some/llava\n  - other/llava\n---\n",
            {},
            {"license": "apache-2.0", "base_model": "some/llava"},
        ),
        ("---\nbase_model: /data/models/llava\n---\n", {}, {}),
    ],
)
def test_what_the_base_says(tmp_path, card, config, expected):
    (tmp_path / "model").mkdir()
    write_model_card(tmp_path / "model", tiny_config(), base=base_folder(tmp_path / "its-base", card, **config))
    found = card_in(tmp_path / "model")
    data = found.data.to_dict()
    assert {key: data[key] for key in ("license", "license_name", "license_link", "base_model") if key in data} == (
        expected
    )
    assert expected.get("base_model", "its-base") in found.text
    assert str(tmp_path) not in found.content
    assert ("does not say" in found.text) == ("license" not in expected)


def test_a_repository_as_base_and_what_is_kept(tmp_path):
    write_model_card(tmp_path, tiny_config(image_keep_rate=0.3, output_predictor=False), base="some/llava@v2")
    card = card_in(tmp_path)
    assert card.data.base_model == "some/llava"
    assert "| image tokens kept | 0.3 of each picture |" in card.text
    assert "| output tokens kept | all |" in card.text
    for words in ("import dynamic_llava", "trust_remote_code=True"):
        assert words in card.text


def test_a_card_that_somebody_wrote_stays_and_an_empty_form_does_not(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    write_model_card(tmp_path, tiny_config())
    assert path.read_text() == "# Mine\n"
    path.write_text("# Model Card for Model ID\n\n[More Information Needed]\n")
    write_model_card(tmp_path, tiny_config())
    card_in(tmp_path)


RESULTS = {
    "settings": {"image_keep_rate": 0.2, "output_sparsity": None, "image_selector": "predictor"},
    "metrics": {"gqa": {"exact_match": 0.6125, "exact_match_stderr": 0.01}},
}
REPORT = {
    "rows": [
        {
            "label": "Dense base",
            "accuracy": 0.91,
            "perplexity": 1.25,
            "image_kept_fraction": 1.0,
            "output_kept_fraction": 1.0,
        }
    ]
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("results.json", RESULTS, "| gqa | exact_match | 0.6125 |"),
        ("eval/results.json", RESULTS, "Kept: image_keep_rate=0.2."),
        ("report.json", REPORT, "| Dense base | 91.0 % | 1.250 | 100.0 % | 100.0 % |"),
        ("report/report.json", REPORT, "## Results"),
        ("results.json", {"results": {"of": "another program"}}, None),
        ("report.json", [1], None),
    ],
)
def test_results_beside_a_run_go_with_its_conversion(tmp_path, name, content, expected):
    run = tmp_path / "run"
    tiny_model().save_pretrained(run)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(json.dumps(content))
    convert(run, tmp_path / "shared", "ours", say=lambda line: None)
    text = card_in(tmp_path / "shared").text
    assert expected in text if expected else "## Results" not in text
    # And with a card that is made where they lie.
    (run / "README.md").unlink()
    write_model_card(run, tiny_config())
    text = card_in(run).text
    assert expected in text if expected else "## Results" not in text


def test_a_lora_folder_has_a_card_of_its_own(tmp_path):
    base_folder(tmp_path / "base", "---\nlicense: llama2\nbase_model: some/llava\n---\n")
    model = tiny_model()
    model.name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["image_predictor", "output_predictor"])
    save_adapter(get_peft_model(model, lora), tmp_path / "lora")
    card = card_in(tmp_path / "lora")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", "llama2", "some/llava")
    assert "load_adapter" in card.text
    assert not list((tmp_path / "lora").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "lora" / "config.json").read_text())


@pytest.mark.parametrize("door", ["push_to_hub", "save_pretrained"])
def test_a_push_takes_code_and_card_along(tmp_path, monkeypatch, door):
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            pushed.update({item.path_in_repo: Path(item.path_or_fileobj).read_bytes() for item in operations})

        def __getattr__(self, name):
            return lambda *_, **__: None

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    model = tiny_model()
    if door == "push_to_hub":
        model.push_to_hub("someone/some-llava")
    else:
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/some-llava")
    (tmp_path / "hub").mkdir()
    for name, content in pushed.items():
        (tmp_path / "hub" / name).write_bytes(content)
    card_in(tmp_path / "hub")
    assert "auto_map" in json.loads(pushed["config.json"])
    assert "modeling_dynamic_llava.py" in pushed
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), loaded.parameters(), strict=True))
