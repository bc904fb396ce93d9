"""Ends that a run must survive: a signal to stop, and a loss that is no number."""

from __future__ import annotations

import signal

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """SIGTERM (preemption) and SIGUSR1 (Slurm's warning) save after the step in progress and end the training.

    Attributes:
        stopped: whether that has happened.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._asked_anywhere(args):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def _ask(self, number, frame) -> None:
        self.asked = True

    def _asked_anywhere(self, args) -> bool:
        """All ranks stop after the same step, also where the signal has reached one of them."""
        if args.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)


def check_finite(loss: torch.Tensor, step: int, ids: list[str] | None) -> None:
    """`ValueError` that names the samples of a micro-batch whose loss is NaN or infinite."""
    if not torch.isfinite(loss):
        samples = ", ".join(map(str, ids)) if ids else "unknown"
        raise ValueError(
            f"The loss of step {step + 1} is {float(loss)}, on the samples {samples}. The last checkpoint is as it "
            "was; lower learning_rate or predictor_learning_rate, or look at these samples."
        )
