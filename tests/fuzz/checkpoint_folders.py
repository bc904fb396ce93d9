"""Good checkpoints of every layout, and what to make of their weight files."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamic_llava.checkpoints import load_checkpoint, save_adapter

from ..checkpoints.test_adapters import trained_adapter
from ..checkpoints.writing import model_of, write_published
from ..tiny import stock_model, tiny_model
from .mutators import ESCAPE, anything

ASSET = Path(__file__).parents[2] / "assets" / "tiny-llava"
LAYOUTS = ("ours", "stock", "published", "shards", "bin", "separate", "lora")
HUGGING_FACE = ("ours", "stock")


def write_layouts(root: Path) -> dict[str, Path]:
    """A folder of each layout below `root`, with a tokenizer."""
    folders = {layout: root / layout for layout in LAYOUTS}
    model, published = _without_equal_weights(tiny_model()), _without_equal_weights(model_of())
    model.save_pretrained(folders["ours"])
    stock_model(model).save_pretrained(folders["stock"])
    write_published(published, folders["published"])
    write_published(published, folders["shards"], "model.safetensors:3")
    write_published(published, folders["bin"], "pytorch_model.bin:2")
    write_published(published, folders["separate"], tower="separate")
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
            shutil.copyfile(ASSET / name, folder / name)
    model.save_pretrained(folders["lora"] / "base")
    # The folder is copied for each case: its base is found below wherever it is.
    model.name_or_path = "base"
    save_adapter(trained_adapter(model), folders["lora"])
    return folders


def _without_equal_weights(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with noise on its norms and biases, which are all ones and zeros otherwise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def loaded_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def stored_names(folder: Path) -> dict[str, str]:
    """Our name of each stored one: weights are random, so that their values tell."""
    ours = loaded_state(load_checkpoint(folder))
    by_value = {value.numpy().tobytes(): key for key, value in ours.items()}
    return {name: by_value[value.numpy().tobytes()] for name, value in stored_state(folder).items()}


def weight_files(folder: Path) -> list[Path]:
    """The weight files that count: safetensors before pickles."""
    plain = list(folder.glob("*.safetensors"))
    return sorted([*(plain or folder.glob("*.bin")), *folder.glob("clip/*.safetensors")])


def stored_state(folder: Path) -> dict[str, Tensor] | None:
    """What the weight files hold as their own libraries read it; None where one of them cannot."""
    state: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder):
            if not path.is_file():
                return None
            plain = path.suffix == ".safetensors"
            state |= load_file(path) if plain else torch.load(path, map_location="cpu", weights_only=True)
        return {key: value.contiguous() for key, value in state.items()}
    except Exception:
        return None


def write_file(path: Path, state: dict[str, Any]) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


def change_state(rng: Random, path: Path) -> tuple[str, str]:
    """Change one tensor of a weight file; says how and which."""
    plain = path.suffix == ".safetensors"
    state: dict[str, Any] = load_file(path) if plain else torch.load(path, weights_only=True)
    key = rng.choice(sorted(state))
    kind = rng.choice(
        ("drop", "rename", "nan", "inf", "int64", "complex", "shape", "extra", "cast", "transpose", "none")
    )
    value = state[key]
    if kind == "drop":
        del state[key]
    elif kind == "rename":
        state[rng.choice([f"module.{key}", key.upper(), key + "_", key.replace(".", "/")])] = state.pop(key)
    elif kind in ("nan", "inf"):
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = float(kind)
        state[key] = value
    elif kind == "int64":
        state[key] = value.to(rng.choice([torch.int64, torch.int8, torch.bool, torch.uint8]))
    elif kind == "complex":
        state[key] = value.to(torch.complex64)
    elif kind == "shape":
        state[key] = rng.choice([value[..., :-1], value[None], value.view(-1)[:0], torch.zeros(())]).contiguous()
    elif kind == "transpose":
        # The same values in another place are another weight, unless the shape says nothing.
        kind = "shape" if value.dim() == 2 and value.shape[0] != value.shape[1] else "cast"
        state[key] = value.t().contiguous() if kind == "shape" else value
    elif kind == "extra":
        state[rng.choice(["model.layers.77.mlp.up_proj.weight", "model.layers.-1.x", "", "a\0b", "é"])] = value.clone()
    elif kind == "cast":
        state[key] = value.to(rng.choice([torch.float64, torch.bfloat16, torch.float16]))
    elif plain:
        kind = "drop"
        del state[key]
    else:
        state[key] = anything(rng)
    write_file(path, state)
    return kind, key


def change_header(rng: Random, path: Path, mutate) -> None:
    """Change the JSON header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate(rng, json.loads(data[8 : 8 + length]))[0]).encode()
    claimed = rng.choice([len(header)] * 6 + [0, len(header) - 1, 2**40, 2**63])
    path.write_bytes(claimed.to_bytes(8, "little") + header + data[8 + length :])


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def set_trap(rng: Random, folder: Path, canary: Path) -> str:
    """Something that runs code where a reader trusts what it reads; says what."""
    kind = rng.choice(
        ["pickle", "plain pickle", "nested", "auto_map", "tokenizer", "template", "generate", "weight_map"]
    )
    code = f"open({str(canary)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    if kind in ("pickle", "plain pickle", "nested"):
        for path in weight_files(folder):
            path.unlink()
        (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        name = "adapter_model.bin" if (folder / "adapter_config.json").exists() else "pytorch_model.bin"
        evil: Any = Runs(str(canary))
        if kind == "plain pickle":
            (folder / name).write_bytes(pickle.dumps(evil, protocol=rng.randrange(6)))
        else:
            torch.save({"lm_head.weight": evil if kind == "pickle" else [{"a": evil}]}, folder / name)
    elif kind == "auto_map":
        (folder / "evil.py").write_text(code)
        own = json.loads((folder / "config.json").read_text())
        own["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
        if rng.random() < 0.5:
            own["model_type"] = "something_new"
        (folder / "config.json").write_text(json.dumps(own))
    elif kind == "tokenizer":
        (folder / "evil.py").write_text(code)
        entries = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoProcessor": "evil.Model"}}
        for name in ("tokenizer_config.json", "processor_config.json"):
            own = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            own |= entries | {rng.choice(["tokenizer_class", "processor_class"]): "Tokenizer"}
            (folder / name).write_text(json.dumps(own))
    elif kind == "template":
        text = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{% for x in range(10**9) %}a{% endfor %}"
        (folder / "chat_template.jinja").write_text(text.replace("CANARY", str(canary)))
    elif kind == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        (folder / "generation_config.json").write_text(json.dumps({"custom_generate": str(folder)}))
    else:
        names = [f"../{ESCAPE}", "/etc/passwd", "../../x.safetensors", ""]
        index = {"weight_map": {"lm_head.weight": rng.choice(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return kind
