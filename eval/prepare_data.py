"""Official downloads of benchmarks as JSON lines for `--data-root`; the logic is in `dynamic_llava.eval.local`."""

import sys

from dynamic_llava.eval.local.prepare import main

if __name__ == "__main__":
    sys.exit(main())
