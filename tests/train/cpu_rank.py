"""One rank of `python -m dynamic_llava.train` on a CPU, also with DeepSpeed or FSDP, that want GPUs."""

from __future__ import annotations

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from dynamic_llava.train.__main__ import main


def start_on_cpu(self, *args, start=PartialState.__init__, **kwargs) -> None:
    """As `PartialState`, that takes several processes on a CPU for what may be sharded."""
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    prepare = PartialState._prepare_backend
    # With a DeepSpeed file accelerate looks for a GPU, and counts one process where there is none.
    PartialState._prepare_backend = lambda self, cpu=False, *args, **kwargs: prepare(self, True, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState.__init__ = start_on_cpu
    sys.exit(main())
