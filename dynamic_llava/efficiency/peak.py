"""True peak memory of one model, in a process of its own.

Two models in one process, or one after the other, would share an allocator and the peak of the larger. The parent
starts `python -m dynamic_llava.efficiency.peak` with a request on stdin and reads one line of JSON.

On a CPU the peak is the high-water mark of the resident set (VmHWM), interpreter and libraries included, started
anew once the weights are loaded; on a GPU it is `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..errors import ExitStatus, run_command
from ..machine import peak_bytes
from .filled_cache import Context
from .model_pair import build_model
from .shapes import stock_config

CLEAR = Path("/proc/self/clear_refs")
STEPS = 2
# Small, so that the tokens waiting to be appended do not show in the peak.
FILL_BLOCK = 32


def measure_peak(
    config: DynamicLlavaConfig,
    sparse: bool,
    *,
    text_tokens: int,
    batch: int,
    output_lengths: list[int],
    dtype: str,
    device: str,
    attention: str,
    threads: int,
) -> dict[str, Any]:
    """Peak bytes of one model: with its weights alone, after the prefill, and at each output length.

    Raises:
        ValueError: the process ended with what a user can cause, such as a lack of memory.
        RuntimeError: the process failed otherwise; its last lines of output.
    """
    request = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "sparse": sparse,
        "text_tokens": text_tokens,
        "batch": batch,
        "output_lengths": sorted(output_lengths),
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "threads": threads,
    }
    command = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode == ExitStatus.BAD_INPUT:
        raise ValueError(f"The process of the mode peak failed: {done.stderr.splitlines()[-1].removeprefix('error: ')}")
    if done.returncode == -signal.SIGKILL:
        raise MemoryError("The process of the mode peak was killed, as where memory runs out; measure a smaller shape.")
    if done.returncode:
        last_lines = "\n".join(done.stderr.splitlines()[-8:])
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{last_lines}")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    device = torch.device(request["device"])
    config = DynamicLlavaConfig.from_dict(request["config"])
    model = build_model(
        config if request["sparse"] else stock_config(config),
        getattr(torch, request["dtype"]),
        device,
        request["attention"],
    )
    restarted = _restart(device)
    loaded = peak_bytes(device)
    context = Context(model, request["text_tokens"], request["batch"], repeat_prompt=False)
    prefill = peak_bytes(device)
    points = []
    for length in request["output_lengths"]:
        context.fill_to(max(context.written, length - STEPS), FILL_BLOCK)
        while context.written < length:
            context.step()
        points.append({"output_length": length, "peak_bytes": peak_bytes(device)})
    return {"loaded_bytes": loaded, "restarted": restarted, "prefill_peak_bytes": prefill, "points": points}


def _restart(device: torch.device) -> bool:
    """Forget the peak so far; False where the system does not allow it, and loading counts as well."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # 5: set the high-water mark to what is resident now (proc(5)).
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def main() -> int:
    """The process's side: a request on stdin, a line of JSON on stdout; returns the exit status."""
    return run_command(lambda: print(json.dumps(_answer(json.load(sys.stdin)))))


if __name__ == "__main__":
    sys.exit(main())
