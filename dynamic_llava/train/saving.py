"""What a run saves: checkpoints that are whole, the best model, and which predictors have never learned."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..carried_code import without_code
from ..checkpoints.adapters import check_resumed, describe_adapter
from ..checkpoints.load import load_weights
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..reading import read_json_object
from ..sparsity_config import PREDICTOR_NAMES
from .checkpointing import best_of, rotate, write_errors, write_manifest
from .interruption import EvaluationStopped


class SavingTrainer(Trainer):
    """Changes from `Trainer`:
    - a checkpoint counts when its manifest is written (`checkpointing`);
    - beside a LoRA adapter stands also the configuration, which says what it was trained with;
    - a model that is saved says which of its predictors have never learned (`SparsityConfig.untrained`);
    - the best model is found again by its step, in whatever folder the run has moved to, and never removed;
    - an evaluation that a signal ends is made up for when the run goes on.
    """

    def __init__(self, *args, run_config: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.run_config = run_config or {}
        # The sum of each predictor's budget losses on this rank: above zero once it had tokens to judge.
        self._budgets = torch.zeros(len(PREDICTOR_NAMES), device=self.args.device)
        self._evaluation_due = False

    def note_budgets(self, outputs) -> None:
        """Note which predictors a micro-batch had tokens for."""
        found = [outputs.get(f"{name.removesuffix('_predictor')}_budget_loss") for name in PREDICTOR_NAMES]
        for number, budget in enumerate(found):
            if budget is not None:
                self._budgets[number] += budget.detach()

    def update_untrained(self) -> None:
        """Take the predictors that have learned by now out of the configuration's `untrained`; called on all ranks."""
        sparsity = self.accelerator.unwrap_model(self.model).config.sparsity
        sums = self.accelerator.reduce(self._budgets, reduction="sum").tolist()
        learned = {name for name, total in zip(PREDICTOR_NAMES, sums, strict=True) if total > 0}
        sparsity.untrained = [name for name in sparsity.untrained if name not in learned]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`, with an up-to-date `untrained`; a run's result carries its code, its checkpoints do not."""
        self.update_untrained()
        model = self.accelerator.unwrap_model(self.model)
        with without_code(model.config, model) if _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, DynamicLlavaForConditionalGeneration):
            describe_adapter(model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """As `Trainer`, which would not find our weights under the names that `save_pretrained` gives them; FSDP keeps
        its own copy, under the names of the modules."""
        model = self.model if model is None else model
        if not self.is_fsdp_enabled and isinstance(model, DynamicLlavaForConditionalGeneration):
            load_weights(model, resume_from_checkpoint)
            return
        if not self.is_fsdp_enabled:
            check_resumed(model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _take_untrained(self, checkpoint: str | Path) -> None:
        """Go on from the `untrained` of a checkpoint."""
        stored = read_json_object(Path(checkpoint, "config.json"))["sparsity"]
        self.accelerator.unwrap_model(self.model).config.sparsity.untrained = list(stored.get("untrained", []))
        self._budgets.zero_()

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial):
        """As `Trainer`; where a run goes on, also what stands in its checkpoint beside weights and optimizer."""
        done = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None:
            self._take_untrained(resume_from_checkpoint)
            best = best_of(Path(resume_from_checkpoint))
            if best is None and self.state.best_global_step and self.args.load_best_model_at_end:
                raise ValueError(
                    f"The best checkpoint so far, checkpoint-{self.state.best_global_step}, is no longer in "
                    f"{self.args.output_dir}; put it back, or begin anew with restart=true."
                )
            self.state.best_model_checkpoint = None if best is None else str(best)
            control = self.state.stateful_callbacks.get("TrainerControl", {})
            self._evaluation_due = bool(control.get("args", {}).get("should_evaluate"))
        return done

    def _run_epoch(self, model, epoch, trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, **kwargs):
        common = {"model": model, "trial": trial, "epoch": epoch}
        common |= {"ignore_keys_for_eval": ignore_keys_for_eval, "start_time": start_time}
        if self._evaluation_due:
            self._load_rng_state(resume_from_checkpoint)
            self._evaluation_due, self.control.should_evaluate = False, True
            self._maybe_log_save_evaluate(self._tr_loss, None, **common)
        super()._run_epoch(**common, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(model, trial)
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer`, made valid by a manifest at the end; older ones go only then."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        try:
            with write_errors(), self._without_rotation() as limit:
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder, self.run_config)
                rotate(folder.parent, limit, keep=best_of(folder))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be saved ({error}); it was removed and earlier checkpoints are as they were. Make "
                "room and start the same command again."
            ) from error

    def _finalize_training(self, *args, **kwargs):
        """As `Trainer`, which would remove the last checkpoint where it is not the best."""
        with self._without_rotation():
            return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As `Trainer`, by our names; not where the training was stopped before its end."""
        if self.state.global_step < self.state.max_steps:
            return
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        self._take_untrained(best)

    @contextmanager
    def _without_rotation(self):
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit
