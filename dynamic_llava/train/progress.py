"""What a training shows: a line for each log, and at the end what was saved where and what to type next."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers import trainer as stock
from transformers.trainer_callback import PrinterCallback

from ..screen import clock, command
from .config import RESOLVED_CONFIG, StageConfig

METRICS_FILE = "metrics.jsonl"


class ProgressLines(TrainerCallback):
    """A line for each log on the first rank; a bar, in a terminal, while held-out data is scored."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started, self._first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        step, steps = state.global_step, state.max_steps
        if "loss" in logs:
            seconds = time.perf_counter() - self._started
            left = seconds / max(step - self._first, 1) * (steps - step)
            print(training_line(logs, step, steps, left), flush=True)
        elif "eval_loss" in logs:
            print(
                f"{_step(step, steps)}  held-out loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.4g}",
                flush=True,
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if state.is_world_process_zero:
            if self._bar is None:
                hidden = True if args.disable_tqdm else None
                self._bar = tqdm(total=len(eval_dataloader), desc="held-out", leave=False, disable=hidden)
            self._bar.update()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def show_lines(trainer: Trainer) -> None:
    """`ProgressLines` in place of what `Trainer` prints."""
    for callback in (PrinterCallback, stock.DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines())


def training_line(logs: Mapping[str, float], step: int, steps: int, left: float) -> str:
    """One log of a training, `left` seconds before its end."""
    parts = [_step(step, steps), f"loss {logs['loss']:.4f}"]
    rates = ((kind, logs.get(f"{kind}_keep_rate")) for kind in ("image", "output"))
    parts += [f"{kind} kept {rate:.3f}" for kind, rate in rates if rate is not None]
    parts += [f"tau {logs['gumbel_tau']:.3f}"] if "gumbel_tau" in logs else []
    parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
    return "  ".join([*parts, f"{clock(left)} left"])


def print_end(config: StageConfig) -> None:
    """Say what a finished run has saved where, and what to type next."""
    data, run = config.data, config.training.output_dir
    what = "adapter" if config.model.lora_r else "model"
    print(f"Saved in {run}: {what}, processor, {RESOLVED_CONFIG}, {METRICS_FILE}")
    if data.shapes is None:
        print(f"Next: {command('eval', '--config', 'paper', '--model', run)}")
    else:
        words = ("--tasks", "shapes_vqa,shapes_describe", "--data-root", data.image_folder[0])
        print(f"Next: {command('eval', '--model', run, *words)}", flush=True)


def _step(step: int, steps: int) -> str:
    return f"step {step:>{len(str(steps))}}/{steps}"
