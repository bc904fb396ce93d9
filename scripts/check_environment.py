"""Exit with 0 where this interpreter has what scripts/ need: the packages, in the ranges of pyproject.toml."""

import sys
from importlib import metadata

MINIMUM = {
    "torch": (2, 9),
    "transformers": (5, 17),
    "accelerate": (1, 10),
    "peft": (0, 18),
    "datasets": (4,),
    "pillow": (10,),
    "safetensors": (0, 5),
    "deepspeed": (0, 17),
    "lmms-eval": (0, 7, 3),
    "nltk": (3, 9),
    "matplotlib": (3, 9),
    "rich": (13,),
    "fastapi": (0,),
    "uvicorn": (0,),
    "openai": (1, 98),
    "pytest": (8,),
    "ruff": (0, 12),
    "mypy": (2,),
    "dynamic-llava": (0, 1),
}


def numbers(version: str) -> tuple[int, ...]:
    """Leading numeric parts of a version."""
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def main() -> int:
    for name, least in MINIMUM.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            print(f"{name} is missing", file=sys.stderr)
            return 1
        if numbers(found) < least:
            print(f"{name} {found} is older than {'.'.join(map(str, least))}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
