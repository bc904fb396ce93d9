"""What a run saves: its result carries the code that loads it, its checkpoints and LoRA folders do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamic_llava.carried_code import AUTO_MAP
from dynamic_llava.checkpoints import load_processor
from dynamic_llava.train import stage

from .test_stage import config_of, shapes  # noqa: F401  a fixture

STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def carried(folder: Path) -> tuple[bool, dict | None]:
    """Whether code lies in a folder, and what its configuration says of it."""
    return bool(list(folder.glob("*.py"))), json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.mark.parametrize("lora_r", [0, 4])
def test_checkpoints_carry_no_code_and_the_result_does(shapes, tmp_path, lora_r):  # noqa: F811
    lora = {"lora_r": lora_r, "lora_alpha": 8} if lora_r else {}
    config = config_of(shapes, tmp_path / "run", **STEPS, **lora)
    stage.train(config)
    steps = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(steps) == 2
    assert [carried(step) for step in steps] == [(False, None)] * 2
    expected = (False, None) if lora_r else (True, AUTO_MAP)
    assert carried(tmp_path / "run") == expected
    # Killed between its last checkpoint and its result, which the checkpoint then is.
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.unlink()
    stage.train(config)
    assert carried(tmp_path / "run") == expected
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_stage_on_a_base_that_carries_code(shapes, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    config = config_of(shapes, tmp_path / "run", **STEPS)
    stage.build_model(config, tokenizer=None).save_pretrained(base)
    load_processor("assets/tiny-llava").save_pretrained(base)
    assert carried(base) == (True, AUTO_MAP)
    stage.train(config_of(shapes, tmp_path / "run", base_model=base, **STEPS))
    assert carried(tmp_path / "run" / "checkpoint-1") == (False, None)
    assert carried(tmp_path / "run") == (True, AUTO_MAP)
