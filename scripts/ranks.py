"""`python scripts/ranks.py LAUNCHER ...`: as `python -m LAUNCHER ...`, with the status of the process that failed.

The launchers of torch and accelerate end with 1, and a traceback of their own, whatever their processes say.
"""

import runpy
import signal
import sys


def main() -> int:
    """Returns the status of a process that failed, as shells count where a signal ended it, or of an interruption."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
