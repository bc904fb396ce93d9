"""Official downloads of benchmarks as JSON lines for `--data-root`; the logic is in `benchmarks.prepare`."""

import sys

from benchmarks.prepare import main

if __name__ == "__main__":
    sys.exit(main())
