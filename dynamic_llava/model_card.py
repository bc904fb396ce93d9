"""The model card of a saved model or LoRA folder: what it is, what it comes from, how to load it, how well it does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .reading import read_json_object, read_text

CARD_FILE = "README.md"
# Where a run's evaluations lie: those of `eval`, and those of `eval.report`.
RESULTS = ("results.json", "eval/results.json")
REPORTS = ("report.json", "report/report.json")
# What the forms of transformers and peft say where nobody has filled them in.
_UNFILLED = "[More Information Needed]"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """---
{head}
---

# Dynamic-LLaVA

A LLaVA-1.5 that drops image and output tokens from its decoder layers {sparse_layer} to {last_layer}
([arXiv 2412.00876](https://arxiv.org/abs/2412.00876)).{adapter}

| | |
|---|---|
| base model | {base} |
| decoder | {layers} layers, hidden size {hidden} |
| vision tower | {vision} |
| image tokens kept | {image} |
| output tokens kept | {output} |

## How to load

{load}
{results}## License

{license}

## Citation

```bibtex
@inproceedings{{huang2025dynamicllava,
  title     = {{Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
               Sparsification}},
  author    = {{Huang, Wenxuan and Zhai, Zijie and Shen, Yunhang and Cao, Shaosheng and Zhao, Fei and Xu, Xiangfeng and
               Ye, Zheyu and Hu, Yao and Lin, Shaohui}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2025}}
}}
```
"""

LOAD = """```python
import dynamic_llava  # leave this out where the package is not installed, and pass trust_remote_code=True below
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER_OR_REPOSITORY)
processor = AutoProcessor.from_pretrained(FOLDER_OR_REPOSITORY)
```

The code lies beside the weights: with `trust_remote_code=True` the same lines work without the package.
"""

LOAD_ADAPTER = """```python
from dynamic_llava.checkpoints import load_adapter, load_processor

model = load_adapter(FOLDER_OR_REPOSITORY, merge=True)
processor = load_processor(FOLDER_OR_REPOSITORY)
```

`dynamic-llava checkpoints merge` makes a whole model of it, which loads without the package too.
"""


def model_card(
    config, base: str | Path | None = None, adapter: bool = False, results_in: tuple[str | Path, ...] = ()
) -> str:
    """The card of a model, as Markdown.

    Args:
        config: `DynamicLlavaConfig`.
        base: folder or repository of the checkpoint that it was made from.
        adapter: whether it is a LoRA on that base.
        results_in: folders in which its evaluations may lie.
    """
    sparsity, text, vision = config.sparsity, config.text_config, config.vision_config
    said = _said_of(base)
    repository = said.get("base_model")
    name = repository or (f"`{Path(base).name}`" if base else "")
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        **{key: said[key] for key in _LICENSE_KEYS if key in said},
        **({"base_model": repository} if repository else {}),
        "tags": ["llava", "dynamic-llava", "token-pruning"],
    }
    return CARD.format(
        # JSON is YAML.
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        adapter=" This folder holds a LoRA of its decoder, and its predictors in full." if adapter else "",
        base=name or "not noted",
        sparse_layer=sparsity.sparse_layer,
        last_layer=text.num_hidden_layers - 1,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vision=f"{vision.num_hidden_layers} layers, {vision.image_size} px in patches of {vision.patch_size}",
        image=f"{sparsity.image_keep_rate:g} of each picture" if sparsity.image_predictor else "all",
        output=f"trained at {sparsity.output_keep_rate:g}" if sparsity.output_predictor else "all",
        load=LOAD_ADAPTER if adapter else LOAD,
        results=_results([Path(folder) for folder in results_in]),
        license=f"{said['license']}, as its base."
        if "license" in said
        else f"The base{f' ({name})' if name else ''} does not say under which license it stands: the owner of this "
        "model has to find out, and to write `license:` into the first lines of this file.",
    )


def write_model_card(
    folder: str | Path,
    config,
    base: str | Path | None = None,
    adapter: bool = False,
    results_in: tuple[str | Path, ...] = (),
) -> None:
    """Write `README.md` into `folder` unless it has one that somebody has written; arguments as `model_card`."""
    path = Path(folder) / CARD_FILE
    if path.exists() and _UNFILLED not in path.read_text(encoding="utf-8", errors="replace"):
        return
    if base is not None and Path(base).is_dir() and Path(base).resolve() == Path(folder).resolve():
        base = None
    path.write_text(model_card(config, base, adapter, (folder, *results_in)), encoding="utf-8")


def _said_of(base: str | Path | None) -> dict[str, str]:
    """What the card and `config.json` of a checkpoint say of its license, and the repository that it is or comes from;
    of a repository what has been downloaded."""
    if not base:
        return {}
    said: dict[str, str] = {}
    files = {name: _file_of(base, name) for name in ("config.json", CARD_FILE)}
    with suppress(ValueError, OSError):
        if files["config.json"]:
            values = read_json_object(files["config.json"])
            said |= {key: values[key] for key in _LICENSE_KEYS if isinstance(values.get(key), str)}
    with suppress(ValueError, OSError):
        if files[CARD_FILE]:
            said |= _front_matter(read_text(files[CARD_FILE]))
    if not Path(base).is_dir():
        # Without the revision.
        said["base_model"] = str(base).partition("@")[0]
    if not _REPOSITORY.fullmatch(said.get("base_model", "")):
        said.pop("base_model", None)
    return said


def _file_of(base: str | Path, name: str) -> Path | None:
    if Path(base).is_dir():
        return Path(base) / name
    repository, _, revision = str(base).partition("@")
    with suppress(OSError, ValueError):
        # `cached_file` gives None, or raises, for what was not downloaded.
        found = cached_file(repository, name, revision=revision or None, local_files_only=True)
        return None if found is None else Path(found)
    return None


def _front_matter(card: str) -> dict[str, str]:
    """The license and the base model that the first lines of a card name; of several bases the first."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", "\n".join(card.splitlines()), re.DOTALL)
    line = rf"^({'|'.join((*_LICENSE_KEYS, 'base_model'))}):[ \t]*(?:\n[ \t]*-[ \t]*)?(\S.*?)[ \t]*$"
    pairs = re.findall(line, match[1] if match else "", re.MULTILINE)
    return {key: value.strip("\"'[] ") for key, value in pairs if value.strip("\"'[] ")}


def _results(folders: list[Path]) -> str:
    """The section of the evaluations in `folders`, empty where there are none."""
    tables = [table for folder in folders for table in _tables(folder)]
    return "".join(["\n## Results\n", *dict.fromkeys(tables)]) + "\n" if tables else "\n"


def _tables(folder: Path) -> Iterator[str]:
    for names, table in ((RESULTS, _metrics_table), (REPORTS, _report_table)):
        for name in names:
            # Of other programs, perhaps: a card is no reason for a save to fail.
            with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
                if (folder / name).is_file():
                    yield table(read_json_object(folder / name))


def _metrics_table(results: dict[str, Any]) -> str:
    settings = {name: value for name, value in results["settings"].items() if value not in (None, "predictor")}
    said = ", ".join(f"{name}={value}" for name, value in settings.items()) or "as trained"
    rows = [
        f"| {task} | {metric} | {value:.4g} |\n"
        for task, metrics in results["metrics"].items()
        for metric, value in metrics.items()
        if not metric.endswith("_stderr")
    ]
    return f"\nKept: {said}.\n\n| task | metric | value |\n|---|---|---|\n{''.join(rows)}"


def _report_table(report: dict[str, Any]) -> str:
    rows = [
        f"| {row['label']} | {100 * row['accuracy']:.1f} % | {row['perplexity']:.3f} "
        f"| {100 * row['image_kept_fraction']:.1f} % | {100 * row['output_kept_fraction']:.1f} % |\n"
        for row in report["rows"]
    ]
    head = "| | accuracy | perplexity | image tokens kept | output tokens kept |\n|---|---|---|---|---|\n"
    return f"\nOn the shapes questions and descriptions:\n\n{head}{''.join(rows)}"
