"""The output predictor's decisions brought to its keep rate, on training answers.

Training meets the rate with draws; inference keeps what is more likely kept than not, which may be less or more. An
offset of the first keep logit sets that right. It goes into the predictor's last bias, so that it holds in every layout
and without any argument; those of other rates go into `SparsityConfig.output_offsets`, for `output_keep_rate` per call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checkpoints import load_checkpoint
from ..checkpoints.adapter_files import ADAPTER_WEIGHTS
from ..data import LlavaCollator
from ..files import write_atomically
from ..loading import is_adapter
from ..model_kinds import is_published
from ..offsets import OFFSET_RATES
from ..reading import read_json_object
from ..token_masks import answer_token_mask
from ..weight_files import list_tensors, weight_files

# Answers whose tokens an offset is found on; some ten thousand tokens.
ANSWERS = 128
BATCH = 8
# Samples looked at for each answer that is long enough, before there are taken to be none.
MOST_LOOKED_AT = 200


def calibrate(
    folder: str | Path, dataset: Dataset, processor, answers: int = ANSWERS, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Fold the offset of the configured rate into the output predictor of a checkpoint, and note those of other rates.

    Args:
        folder: of a run or of another checkpoint in our layout, a LoRA folder too; its weight file and `config.json`
            are written anew, each whole or not at all.
        dataset: training data; of it, answers of at least `min_output_length` tokens.
        processor: LLaVA's.
        answers: how many.
        device: where to compute; the tower and the dense layers alone are put there.

    Returns:
        `answers`, `tokens`, `rate`, and the fraction of these tokens that is kept `before` and `after`.

    Raises:
        ValueError: another layout, an output predictor that is off or has never been trained, no answer that is long
            enough.
    """
    folder = Path(folder)
    values = checked_config(folder)
    model = load_checkpoint(folder)
    sparsity, decoder = model.config.sparsity, model.model.language_model
    # Keep logits need no more; the sparse layers of a 7B are nine tenths of it.
    del decoder.layers[sparsity.sparse_layer :]
    model = model.to(device).eval()
    batches = list(_batches(dataset, processor, sparsity.min_output_length, answers))
    head = decoder.output_predictor.head
    before = _margins(model, batches)
    offset = offset_of(before, sparsity.output_keep_rate)
    bias = _shift_stored(folder, f"output_predictor.head.{len(head) - 1}.bias", offset)
    with torch.no_grad():
        head[-1].bias.copy_(bias)
    # Measured anew: 16 bits round the bias, and what comes of it.
    after = _margins(model, batches)
    rates = sorted({*OFFSET_RATES, sparsity.output_keep_rate} - {1.0})
    values["sparsity"]["output_offsets"] = {f"{rate:.12g}": offset_of(after, rate) for rate in rates}
    write_atomically(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    kept = {"before": float((before > 0).double().mean()), "after": float((after > 0).double().mean())}
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return {"answers": rows, "tokens": len(after), "rate": sparsity.output_keep_rate, **kept}


def offset_of(margins: Tensor, rate: float) -> float:
    """What is added to `margins (T,)`, first keep logit minus second, so that about `rate` of them are above 0.

    It lies halfway between two margins, so that roundings change no decision.
    """
    values, counts = margins.double().unique(return_counts=True)
    ends = values[:1] - 1, values[-1:] + 1
    borders = torch.cat([ends[0], (values[1:] + values[:-1]) / 2, ends[1]])
    above = len(margins) - torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
    return -float(borders[(above - rate * len(margins)).abs().argmin()])


def checked_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder whose output predictor can be calibrated; errors as `calibrate`."""
    values = read_json_object(folder / "config.json", "configuration")
    if is_published(values):
        raise ValueError(
            f"{folder} is in LLaVA's own layout; convert it first: dynamic-llava checkpoints convert {folder} DST --to "
            "ours."
        )
    if not learns_outputs(values):
        raise ValueError(f"{folder}: its output_predictor is off, or has never been trained. Train it first.")
    return values


def learns_outputs(values: dict[str, Any]) -> bool:
    """Whether a configuration, as it is stored, has an output predictor that has been trained."""
    sparsity = values.get("sparsity") or {"output_predictor": False}
    return sparsity.get("output_predictor", True) and "output_predictor" not in sparsity.get("untrained", [])


def _batches(dataset: Dataset, processor, least: int, answers: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `answers` samples, drawn from `dataset` in one order, with at least `least` output tokens."""
    collate, found, waiting = LlavaCollator(processor), 0, []
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for looked_at, index in enumerate(order, start=1):
        sample = dataset[index]
        judged = sample.get("output_mask")
        if judged is None:
            judged = answer_token_mask(sample["labels"][None])[0]
        if int(judged.sum()) >= max(least, 1):
            waiting.append(sample)
            found += 1
        if len(waiting) == BATCH or (waiting and found == answers):
            yield collate(waiting)
            waiting = []
        if found == answers or looked_at > MOST_LOOKED_AT * max(found, 10):
            break
    if waiting:
        yield collate(waiting)
    if not found:
        raise ValueError(
            f"None of {looked_at} samples has an answer of min_output_length={least} tokens; give the data that the "
            "output predictor was trained on."
        )


@torch.inference_mode()
def _margins(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """First keep logit minus second of every output token, `(T,)` float32 on the CPU."""
    found = []
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        logits = model(**batch, use_cache=False, logits_to_keep=1, output_sparsity=True).output_keep_logits
        judged = batch.get("output_mask")
        if judged is None:
            judged = answer_token_mask(batch["labels"], batch["attention_mask"])
        # Rows are packed to the left.
        packed = torch.arange(logits.shape[1], device=logits.device) < judged.sum(dim=-1, keepdim=True)
        found.append((logits[..., 0].float() - logits[..., 1].float())[packed].cpu())
    return torch.cat(found)


def _shift_stored(folder: Path, ending: str, offset: float) -> Tensor:
    """Add `offset` to the first number of the stored weight whose name has this ending; returns this weight."""
    files = [folder / ADAPTER_WEIGHTS[0]] if is_adapter(folder) else weight_files(folder)[0]
    for path in (path for path in files if path.suffix == ".safetensors" and path.is_file()):
        info = list_tensors(path)
        key = next((key for key in info if key.endswith(ending)), None)
        if key is None:
            continue
        tensors = load_file(path)
        tensors[key][0] += offset
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
        return tensors[key]
    raise ValueError(
        f"{folder} holds no {ending} in safetensors; write it anew: dynamic-llava checkpoints convert {folder} DST "
        "--to ours."
    )


def summary(found: dict[str, float]) -> str:
    """What was done, on one line."""
    return (
        f"output_keep_rate {found['rate']:g}: of {found['tokens']} tokens of {found['answers']} training answers "
        f"{found['after']:.3f} are kept, {found['before']:.3f} before."
    )
