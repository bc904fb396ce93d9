"""`Trainer` of the sparsification stage: temperature per step, two learning rates, budgets and keep rates logged."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..data import LengthGroupedSampler
from ..decisions import weighted_losses
from ..loading import PREDICTORS
from ..sparsity_config import KINDS
from .interruption import check_finite
from .monitoring import KEEP_COUNTS, Meter, group_norms, keep_counts, pop_keep_rates
from .progress import METRICS_FILE
from .saving import SavingTrainer
from .schedules import draw_rate, gumbel_tau, keep_rate

LOGGED = (
    "lm_loss",
    *(f"{name}_budget_loss" for name in KINDS),
    "tokens",
    *(f"{name}_keep_entropy" for name in KINDS),
    *KEEP_COUNTS,
)


class StageTrainer(SavingTrainer):
    """Changes from `SavingTrainer` and `Trainer`:
    - every forward gets the step's `gumbel_tau`;
    - predictors are a parameter group with `predictor_learning_rate`;
    - the budgets, means over the rows of a micro-batch, are divided by the accumulation steps, as the LM loss is;
    - a loss that is no number ends the run, and one without a batch does not begin;
    - batches of similar length come from lengths that are counted without opening pictures;
    - keep rates follow their schedule, or are drawn for each step;
    - the log holds LM loss, budgets, realised keep rates, temperature, learning rates, gradient norms by group, tokens
      per second and memory, over the accumulated micro-batches and all ranks;
    - evaluation is the LM loss under the decisions of inference, and its perplexity.
    """

    # The LM loss is divided by the tokens of the whole accumulated batch and the budgets by its steps, in compute_loss.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._micro_steps = 0
        self._last_tau = self.args.gumbel_tau_start
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        self._meter = Meter(weights, self.args.peak_tflops, self.args.device)
        self._norms: dict[str, float] = {}
        self._predictor_rate = 0.0

    def current_tau(self) -> float:
        """Gumbel temperature of the optimizer step in progress."""
        progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        return gumbel_tau(progress, self.args.gumbel_tau_start, self.args.gumbel_tau_end)

    def current_rates(self) -> dict[str, Any]:
        """Keep rates of the optimizer step in progress, as arguments of the model; empty for the model's own."""
        args, sparsity = self.args, self.accelerator.unwrap_model(self.model).config.sparsity
        progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        rates: dict[str, Any] = {}
        for number, name in enumerate(("image_keep_rate", "output_keep_rate")):
            if not getattr(sparsity, name.replace("keep_rate", "predictor")):
                continue
            between = getattr(args, f"{name}s")
            if between is not None:
                rates[name] = draw_rate(*between, seed=args.seed + number, step=self.state.global_step)
                rates["elastic"] = True
            elif args.keep_rate_schedule != "constant":
                rates[name] = keep_rate(progress, getattr(sparsity, name), args.keep_rate_schedule, args.keep_rate_ramp)
        return rates

    def _clip_grad_norm(self, model):
        self._norms = group_norms(self.optimizer, self.accelerator.scaler)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            # Gradients are not clipped.
            self._norms = group_norms(self.optimizer, self.accelerator.scaler)
        return super()._get_grad_norm(model, grad_norm)

    def _get_learning_rate(self) -> float:
        """As `Trainer`, which asks behind the optimizer's step and in front of the scheduler's; the predictors' too."""
        self._predictor_rate = float(self.optimizer.param_groups[-1]["lr"])
        return super()._get_learning_rate()

    def set_initial_training_values(self, args, dataloader):
        """As `Trainer`, which would end a run without a batch as if it had been trained."""
        if len(dataloader) == 0:
            raise ValueError(
                f"{len(self.train_dataset)} samples make no batch of per_device_train_batch_size="
                f"{args.per_device_train_batch_size} on {args.world_size} rank(s) with dataloader_drop_last="
                f"{args.dataloader_drop_last}; lower the batch size, or set dataloader_drop_last=false."
            )
        return super().set_initial_training_values(args, dataloader)

    def evaluate(self, *args, **kwargs):
        """As `Trainer`, leaving the random state as it was: whether a run is scored does not change what it draws."""
        self.update_untrained()
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: logits of a whole vocabulary would be gathered for nothing."""
        return super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)

    def _get_train_sampler(self, train_dataset=None):
        """As `Trainer`, which would open every picture to learn the lengths."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy != "group_by_length" or not hasattr(type(dataset), "lengths"):
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroupedSampler(dataset.lengths, args.train_batch_size * args.gradient_accumulation_steps, seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `--optim`) over decoder and predictors, each with its own learning rate."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.model, self.args)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """LM loss over the accumulated batch's tokens + the weighted budgets and entropies over its rows.

        In evaluation the LM loss under the decisions of inference.
        """
        ids = inputs.pop("ids", None)
        if not model.training:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, skip_logits=True)
            return (outputs.lm_loss, outputs) if return_outputs else outputs.lm_loss
        self._last_tau = self.current_tau()
        outputs = model(
            **inputs, gumbel_tau=self._last_tau, num_items_in_batch=num_items_in_batch, **self.current_rates()
        )
        sparsity = self.accelerator.unwrap_model(model).config.sparsity
        steps = self.current_gradient_accumulation_steps
        lm_loss = outputs.lm_loss if num_items_in_batch is not None else outputs.lm_loss / steps
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Tokens were counted over all ranks, and DDP averages over them.
            lm_loss = lm_loss * self.accelerator.num_processes
        loss = lm_loss
        for part in weighted_losses(outputs, sparsity):
            loss = loss + part / steps
        check_finite(loss.detach(), self.state.global_step, ids)
        self._record(inputs, outputs, lm_loss, steps)
        return (loss, outputs) if return_outputs else loss

    def _record(self, inputs, outputs, lm_loss, steps: int) -> None:
        self._micro_steps += 1
        self.note_budgets(outputs)
        values = {"lm_loss": lm_loss * steps}
        self._sums["tokens"] += inputs["attention_mask"].sum()
        values |= {
            key: outputs[key]
            for key in LOGGED
            if key.endswith(("_budget_loss", "_keep_entropy")) and outputs.get(key) is not None
        }
        for key, value in values.items():
            self._sums[key] += value.detach().float()
        for key, number in keep_counts(inputs, outputs, self.model.config).items():
            self._sums[key] += number

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log."""
        if "loss" in logs and self._micro_steps:
            sums = self._summed_over_ranks()
            logs |= pop_keep_rates(sums)
            ranks = self.accelerator.num_processes
            logs |= self._norms | self._meter.read(sums.pop("tokens", 0.0), ranks)
            logs |= {key: value / (self._micro_steps * ranks) for key, value in sums.items()}
            logs["gumbel_tau"] = self._last_tau
            logs["predictor_learning_rate"] = self._predictor_rate
            self._sums.clear()
            self._micro_steps = 0
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            self._meter.restart()
        super().log(logs, start_time)

    def _summed_over_ranks(self) -> dict[str, float]:
        """The sums since the last log; a rank that has judged nothing has no entry for it."""
        values = [float(self._sums.get(key, 0.0)) for key in LOGGED]
        total = self.accelerator.reduce(torch.tensor(values, device=self.args.device), reduction="sum").tolist()
        return {key: value for key, value in zip(LOGGED, total, strict=True) if key in self._sums or value}


def parameter_groups(model: nn.Module, args) -> list[dict]:
    """Decoder (and projector) at `learning_rate`, predictors at `predictor_learning_rate`; frozen ones left out."""
    decoder, predictors = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (predictors if any(part in name for part in PREDICTORS) else decoder).append(parameter)
    groups = [
        {"params": decoder, "lr": args.learning_rate, "weight_decay": args.weight_decay},
        {"params": predictors, "lr": args.predictor_learning_rate, "weight_decay": args.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def freeze(model: nn.Module, *, train_projector: bool, train_decoder: bool) -> None:
    """Freeze the vision tower, and the projector and decoder unless asked; predictors always learn."""
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            learns = False
        elif "multi_modal_projector" in name:
            learns = train_projector
        else:
            learns = train_decoder or any(part in name for part in PREDICTORS)
        parameter.requires_grad_(learns)


class MetricsFile(TrainerCallback):
    """Append every log to `metrics.jsonl` in the run's folder."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / METRICS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
