"""The paper's generation benchmarks for `--data-root`; the logic is in `dynamic_llava.eval.generation_benchmarks`."""

import sys

from dynamic_llava.eval.generation_benchmarks import main

if __name__ == "__main__":
    sys.exit(main())
