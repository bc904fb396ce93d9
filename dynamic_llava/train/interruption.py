"""Ends that a run must survive: a signal to stop, and a loss that is no number."""

from __future__ import annotations

import signal
import threading
from typing import NoReturn

import torch
from transformers import TrainerCallback

from ..errors import ExitStatus, Interrupted


class EvaluationStopped(Exception):
    """A signal came during an evaluation: it is left, and made up for when the run goes on."""


class StopOnSignal(TrainerCallback):
    """Signals to stop save after the step in progress and end the training; a context in which they are caught.

    SIGTERM (preemption), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal) and SIGINT (Ctrl-C) are alike, but that
    a second Ctrl-C ends at once. Before the first step there is nothing to save, and any of them ends at once; behind
    the last one the run is saved as if none had come. What is ignored already, as `nohup` does, stays ignored.

    Attributes:
        stopped: whether training was ended before its last step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    # Of a person; the others come from a scheduler, for which the job has ended as it should.
    BY_HAND = (signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.stopped = False
        self._begun = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            caught = (number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._ask) for number in caught}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._begun = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._asked_anywhere(args):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if state.global_step < state.max_steps and self._asked_anywhere(args):
            self.stopped = True
            raise EvaluationStopped

    def end(self) -> NoReturn:
        """Leave the process with the status that the signal calls for (`errors.ExitStatus`)."""
        raise SystemExit(128 + self.asked if self.asked in self.BY_HAND else int(ExitStatus.DONE))

    def _ask(self, number: int, frame) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number)
        if not self._begun or (again and number == signal.SIGINT):
            raise Interrupted(number)

    def _asked_anywhere(self, args) -> bool:
        """All ranks stop after the same step, also where the signal has reached one of them."""
        if args.world_size == 1:
            return self.asked is not None
        number = torch.tensor(float(self.asked or 0), device=args.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        if number:
            self.asked = signal.Signals(int(number))
        return bool(number)


def check_finite(loss: torch.Tensor, step: int, ids: list[str] | None) -> None:
    """`ValueError` that names the samples of a micro-batch whose loss is NaN or infinite."""
    if not torch.isfinite(loss):
        samples = ", ".join(map(str, ids)) if ids else "unknown"
        raise ValueError(
            f"The loss of step {step + 1} is {float(loss)}, on the samples {samples}. The last checkpoint is as it "
            "was; lower learning_rate or predictor_learning_rate, or look at these samples."
        )
