"""What a run says of itself beside its losses: gradient norms by group, throughput, memory, and what it keeps."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from ..data.conversation import parse_turns
from ..eval.loading import LoadedModel
from ..eval.viz import patch_sheet, view_patches

# A forward and a backward pass cost about six floating point operations for each weight and token.
FLOPS_PER_WEIGHT = 6


def group_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Norm of the gradients of each parameter group before clipping; empty where they are sharded (DeepSpeed)."""
    groups = optimizer.param_groups
    names = ["decoder", "predictors"] if len(groups) == 2 else ["predictors"]
    norms = {}
    for name, group in zip(names, groups, strict=False):
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if grads:
            norms[f"grad_norm_{name}"] = float(nn.utils.get_total_norm(grads))
    return norms


class Meter:
    """Tokens and seconds since the last log.

    Args:
        weights: parameters of the model.
        peak_tflops: of one device in the compute dtype; None leaves out the utilisation.
    """

    def __init__(self, weights: int, peak_tflops: float | None) -> None:
        self.weights, self.peak_tflops = weights, peak_tflops
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self.started = time.perf_counter()

    def read(self, tokens: float, ranks: int) -> dict[str, float]:
        """`tokens_per_second` of all ranks, `mfu` in [0, 1] (of a dense model of this size), and `memory_gb`."""
        speed = tokens / max(time.perf_counter() - self.started, 1e-9)
        self.restart()
        found = {"tokens_per_second": speed, "memory_gb": memory_bytes() / 1e9}
        if self.peak_tflops:
            found["mfu"] = FLOPS_PER_WEIGHT * self.weights * speed / (self.peak_tflops * 1e12 * ranks)
        return found


def memory_bytes() -> int:
    """Peak memory of this process: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class KeptPatches(TrainerCallback):
    """A picture of the patches kept of a fixed batch, every `steps` steps, in `pictures/` of the run.

    Args:
        samples: LLaVA samples with one image each.
        folder: folder of their images.
        processor: LLaVA processor.
        steps: optimizer steps between pictures.
    """

    def __init__(self, samples: list[dict], folder: Path, processor, steps: int) -> None:
        self.samples, self.folder, self.processor, self.steps = samples, folder, processor, steps

    @classmethod
    def from_file(cls, path: Path, folder: Path, processor, steps: int, number: int = 4) -> KeptPatches:
        """Of the first samples of a LLaVA JSON with an image."""
        samples = [s for s in json.loads(Path(path).read_text()) if isinstance(s.get("image"), str)]
        if not samples:
            raise ValueError(f"{path} has no sample with one image to draw; leave out picture_steps.")
        return cls(samples[:number], Path(folder), processor, steps)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step % self.steps == 0:
            self.draw(model, Path(args.output_dir, "pictures", f"step-{state.global_step:06d}.png"))

    def draw(self, model: nn.Module, path: Path) -> None:
        """Write the sheet of the fixed batch; the model and the random state are left as they were."""
        training = model.training
        loaded = LoadedModel(str(path), model.eval(), self.processor)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            views = [self._view(loaded, sample) for sample in self.samples]
        model.train(training)
        path.parent.mkdir(parents=True, exist_ok=True)
        patch_sheet(views).save(path)

    def _view(self, loaded: LoadedModel, sample: dict):
        question, answer = (turn.text for turn in parse_turns(sample["conversations"])[:2])
        with Image.open(self.folder / sample["image"]) as picture:
            return view_patches(loaded, picture.convert("RGB"), question, answer, 0, ("predictor",))
