"""Serve a checkpoint to clients of OpenAI's API, on the server of transformers: `dynamic-llava serve MODEL`.

Each request may say what it keeps: `image_keep_rate`, `output_keep_rate`, `output_sparsity` and the other per-call
arguments of `generate` stand in its body (`extra_body` of the openai client) or in its `generation_config`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from ..config import Command, option
from ..errors import run_command
from ..packages import require_package

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and where."""

    model: str = option(help="folder or repository, in any layout, LoRA too", positional=True)
    host: str = option("127.0.0.1", "address to listen at")
    port: int = option(8000, "0 takes a free one", "[0, 65535]")
    dtype: str = option("auto", "of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    device: str | None = option(None, "torch device (the GPU where there is one)")
    image_keep_rate: float | None = option(None, "of requests that name none (the checkpoint's)", "(0, 1]")
    output_keep_rate: float | None = option(None, "of requests that name none (as learned)", "(0, 1]")


COMMAND = Command("serve", __doc__, (ServeOptions,))


def run(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it."""
    (values,) = COMMAND.parse(arguments)
    for name in PACKAGES:
        require_package(name, "Serving")
    with _listen(values.host, values.port) as listening:
        # Imported here: wrong arguments and a missing package answer before torch is loaded.
        import uvicorn

        from ..checkpoints.loaded import load_model
        from .server import build_app

        loaded = load_model(values.model, values.dtype, values.device)
        defaults = {name: getattr(values, name) for name in ("image_keep_rate", "output_keep_rate")}
        app = build_app(loaded, {name: value for name, value in defaults.items() if value is not None})
        host, port = listening.getsockname()[:2]
        print(f"{values.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends)", flush=True)
        if not ip_address(host).is_loopback:
            print("Whoever reaches this address may use the model: the server asks for no key.", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `ValueError` where it cannot, in front of everything that takes long."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"Cannot listen at {host}, port {port} ({error.strerror}); pass another --host or --port."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
