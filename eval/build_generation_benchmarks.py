"""The paper's generation benchmarks for `--data-root`; the logic is in `benchmarks.generation`."""

import sys

from benchmarks.generation import main

if __name__ == "__main__":
    sys.exit(main())
