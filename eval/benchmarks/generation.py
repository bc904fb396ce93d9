"""The generation benchmarks of the paper (Sec. 4, Table 3), rebuilt from LVIS-Instruct4V and ShareGPT4V.

The authors' own samples were never released: these follow the published rules, chosen by a hash of each sample and a
seed, so that the same files give the same samples on any machine and in any order. Words are what white space divides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.config import Command, option
from dynamic_llava.data.tables import read_json
from dynamic_llava.errors import run_command
from dynamic_llava.files import output_folder, write_atomically
from dynamic_llava.reading import inside

SCRIPT = "eval/build_generation_benchmarks.py"
MANIFEST = "generation_benchmarks.json"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its name, which download it comes from, how many samples, and which fit.

    `fits` takes the number of words of each answer.
    """

    name: str
    source: str
    samples: int
    rule: str
    fits: Callable[[Sequence[int]], bool]


BENCHMARKS = (
    Benchmark("lvis_vqa", "lvis", 1000, "one round, over 100 words", lambda w: len(w) == 1 and w[0] > 100),
    Benchmark("lvis_vqa_multi", "lvis", 1000, "over 7 rounds and 300 words", lambda w: len(w) > 7 and sum(w) > 300),
    Benchmark(
        "sharegpt4v_vqa", "sharegpt4v", 178, "one round, at least 300 words", lambda w: len(w) == 1 and w[0] >= 300
    ),
)


def content_key(sample: dict[str, Any]) -> str:
    """A hash of what a sample says, whatever its place in the file."""
    content = [sample["id"], sample["image"], [[turn["from"], turn["value"]] for turn in sample["conversations"]]]
    # Half a surrogate pair is text in JSON, and in no file.
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")).hexdigest()


def conversations_of(path: Path) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Samples about one picture whose questions and answers alternate, with the words of each answer.

    Raises:
        ValueError: the file is not LLaVA conversation JSON.
    """
    for number, sample in enumerate(read_json(path)):
        try:
            turns = [turn["from"] for turn in sample["conversations"]]
            words = [len(turn["value"].split()) for turn in sample["conversations"][1::2]]
            picture = sample.get("image")
            if not all(isinstance(turn["value"], str) for turn in sample["conversations"]):
                raise TypeError("a question is no text")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} sample {number} is not a LLaVA conversation ({error!r}); is it the official file?"
            ) from error
        if isinstance(picture, str) and turns and turns == ["human", "gpt"] * (len(turns) // 2) and all(words):
            yield {**sample, "id": str(sample.get("id", number))}, words


def choose(candidates: Iterator[tuple[dict[str, Any], list[int]]], benchmarks: Sequence[Benchmark], seed: int):
    """Samples of each benchmark by name: those with the smallest hashes of seed and content, each content once."""
    fitting: dict[str, dict[str, dict[str, Any]]] = {benchmark.name: {} for benchmark in benchmarks}
    for sample, words in candidates:
        for benchmark in benchmarks:
            if benchmark.fits(words):
                key = content_key(sample)
                fitting[benchmark.name][hashlib.sha256(f"{seed} {key}".encode()).hexdigest()] = sample
    return {
        benchmark.name: [fitting[benchmark.name][rank] for rank in sorted(fitting[benchmark.name])][: benchmark.samples]
        for benchmark in benchmarks
    }


def build(
    sources: dict[str, Path],
    image_folders: Sequence[Path],
    output: Path,
    seed: int = 0,
    allow_fewer: bool = False,
) -> dict[str, Any]:
    """Write one file per benchmark and, at the end, the manifest with ids and hashes, which is returned.

    Args:
        sources: `lvis` and `sharegpt4v` -> the downloaded JSON; a benchmark whose source is left out is not built.
        image_folders: the paths of the samples' pictures are below one of these.
        output: folder, for `--data-root`.
        seed: of the choice.
        allow_fewer: take what there is where too few samples fit.

    Raises:
        FileNotFoundError: a download or a picture is missing.
        ValueError: too few samples fit, or a file is not what it should be.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    manifest: dict[str, Any] = {"seed": seed, "benchmarks": {}}
    for source, path in sources.items():
        benchmarks = [benchmark for benchmark in BENCHMARKS if benchmark.source == source]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; pass the downloaded JSON as --{source}.")
        chosen = choose(conversations_of(path), benchmarks, seed)
        for benchmark in benchmarks:
            samples = chosen[benchmark.name]
            if len(samples) < benchmark.samples and not (allow_fewer and samples):
                raise ValueError(
                    f"{benchmark.name} needs {benchmark.samples} samples of {benchmark.rule}; {path} has "
                    f"{len(samples)}. Pass the whole file, or --allow-fewer to take those."
                )
            digest = hashlib.sha256("".join(map(content_key, samples)).encode()).hexdigest()
            manifest["benchmarks"][benchmark.name] = {
                "source": path.name,
                "rule": benchmark.rule,
                "samples": len(samples),
                "sha256": digest,
                "ids": [sample["id"] for sample in samples],
            }
            files[benchmark.name] = _with_pictures(samples, image_folders)
    output_folder(output)
    for name, samples in files.items():
        _write(output / f"{name}.json", samples)
    _write(output / MANIFEST, manifest)
    return manifest


def _with_pictures(samples: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The samples with whole paths of their pictures; `FileNotFoundError` names those that no folder has."""
    found, missing = [], []
    for sample in samples:
        paths = [inside(folder, sample["image"], f"sample {sample['id']!r}") for folder in folders]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            missing.append(sample["image"])
        else:
            kept = {name: sample[name] for name in ("id", "conversations")}
            found.append({**kept, "image": str(path.resolve())})
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(samples)} pictures are in none of {', '.join(map(str, folders))}, such as "
            f"{', '.join(missing[:3])}; fetch them, or name the folder that holds them with --image-folder."
        )
    return found


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))


@dataclass
class BuildOptions:
    """What is built, and of what."""

    image_folder: list[str] = option(help="folders that hold coco/, sam/, ...")
    output: str = option(help="folder for --data-root")
    lvis: str | None = option(None, "lvis_instruct4v_220k.json of X2FD/LVIS-Instruct4V")
    sharegpt4v: str | None = option(None, "sharegpt4v_instruct_gpt4-vision_cap100k.json of ShareGPT4V")
    seed: int = option(0, "of the choice", "[0, 4294967296)")
    allow_fewer: bool = option(False, "take what there is where too few samples fit")


COMMAND = Command(SCRIPT, __doc__, (BuildOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Build what the command line asks for."""
    (args,) = COMMAND.parse(words)
    sources = {name: Path(getattr(args, name)) for name in ("lvis", "sharegpt4v") if getattr(args, name)}
    if not sources:
        raise ValueError("Nothing to build from; pass --lvis, --sharegpt4v or both.")
    output = Path(args.output)
    manifest = build(sources, [Path(name) for name in args.image_folder], output, args.seed, args.allow_fewer)
    for name, entry in manifest["benchmarks"].items():
        print(f"{name}: {entry['samples']} samples in {output / f'{name}.json'}, sha256 {entry['sha256'][:16]}")
