"""Trainers of others teach the predictors: stock `Trainer`, and trl's `SFTTrainer` by the recipe of docs/serving.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_processor

from .tiny import batch_of, image_run, pictures, tiny_model, words

BASE = "assets/tiny-llava"
RECIPE = Path(__file__).parent.parent / "docs" / "serving.md"
COLOURS = ("red", "green", "blue", "yellow")


def predictors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "_predictor." in name}


def unmoved(before: dict[str, torch.Tensor], model) -> list[str]:
    after = predictors(model)
    return [name for name, value in before.items() if torch.equal(value, after[name])]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_stock_trainer(tmp_path, accumulation):
    model, rows = tiny_model(), []
    for seed in range(4):
        ids = [1, *image_run(), *words(3, seed), *words(8, seed + 9)]
        labels = torch.tensor([-100] * 20 + ids[20:])
        batch = batch_of([ids], [pictures(1, seed)], "right")
        rows.append({"labels": labels, **{name: value[0] for name, value in batch.items()}})
    before = predictors(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not unmoved(before, model)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "model" / "modeling_dynamic_llava.py").is_file()


def recipe() -> dict:
    """What the Python of the page defines between its headings on trl and the next."""
    section = RECIPE.read_text().split("## Train with trl")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(code.split("# Your data")[0], names)
    return names


def test_the_recipe_for_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig

    names, taus = recipe(), []

    class Noting(names["SparseSFTTrainer"]):
        def training_step(self, model, *args, **kwargs):
            forward = model.forward
            model.forward = lambda **call: (taus.append(call["gumbel_tau"]), forward(**call))[1]
            try:
                return super().training_step(model, *args, **kwargs)
            finally:
                del model.forward

    question = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    rows = [
        {
            "images": [Image.new("RGB", (64, 64), colour)],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": " ".join([colour] * 60)}]}],
        }
        for colour in COLOURS
    ]
    model = DynamicLlavaForConditionalGeneration.from_pretrained(BASE)
    before = predictors(model)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        max_length=None,
        bf16=False,
        use_cpu=True,
    )
    trainer = Noting(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=load_processor(BASE)
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    # The question and the picture cost nothing, the answers do.
    assert (labels[:, :64] == -100).all()
    assert ((labels != -100).sum(dim=1) >= 60).all()
    trainer.train()
    assert not unmoved(before, model)
    assert taus[0] == 1.0
    assert taus[-1] == pytest.approx(0.1**0.5)
