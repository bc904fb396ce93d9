"""One rank of `python -m dynamic_llava.train` on a CPU, also with DeepSpeed, for which accelerate wants a GPU."""

from __future__ import annotations

import sys

from accelerate.state import PartialState

from dynamic_llava.train.__main__ import main

if __name__ == "__main__":
    prepare = PartialState._prepare_backend
    # With a DeepSpeed file accelerate looks for a GPU, and counts one process where there is none.
    PartialState._prepare_backend = lambda self, cpu=False, *args, **kwargs: prepare(self, True, *args, **kwargs)
    sys.exit(main())
