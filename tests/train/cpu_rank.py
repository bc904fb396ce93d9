"""One rank of `python -m dynamic_llava.train` on a CPU, also with DeepSpeed or FSDP, that want GPUs."""

from __future__ import annotations

import json
import os
import sys
from functools import partialmethod

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from dynamic_llava.train.__main__ import main
from dynamic_llava.train.trainer import StageTrainer


def start_on_cpu(self, *args, start=PartialState.__init__, **kwargs) -> None:
    """As `PartialState`, that takes several processes on a CPU for what may be sharded."""
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def evaluate(self, *args, scores: dict[str, float], original=StageTrainer.evaluate, **kwargs) -> dict[str, float]:
    """As `StageTrainer.evaluate`, with a score of ours for each step."""
    return {**original(self, *args, **kwargs), "eval_loss": scores[str(self.state.global_step)]}


if __name__ == "__main__":
    if "SCORES" in os.environ:
        StageTrainer.evaluate = partialmethod(evaluate, scores=json.loads(os.environ["SCORES"]))
    prepare = PartialState._prepare_backend
    # With a DeepSpeed file accelerate looks for a GPU, and counts one process where there is none.
    PartialState._prepare_backend = lambda self, cpu=False, *args, **kwargs: prepare(self, True, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState.__init__ = start_on_cpu
    sys.exit(main())
