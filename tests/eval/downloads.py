"""Eight documents of each benchmark in the layout of its official download, below LLaVA's playground/data/eval."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

COUNT = 8
ANSWERS = 10


def picture(path: Path, shade: int = 0) -> None:
    """A small image whose grey tells which document it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path, format="PNG")


def encoded(shade: int) -> str:
    """A small image as MMBench's table holds it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def open_answers(index: int, agreeing: int) -> list[str]:
    """Ten answers, of which `agreeing` say `red`."""
    return ["red"] * agreeing + [f"other{index}"] * (ANSWERS - agreeing)


# How many of the ten people agree with the answer that the tests give.
AGREEING = (10, 10, 3, 2, 1, 0, 10, 0)


def vqav2(root: Path) -> None:
    folder = root / "vqav2"
    questions, annotations = [], []
    for index, agreeing in enumerate(AGREEING):
        picture(folder / f"val2014/COCO_val2014_{index:012d}.jpg", index)
        questions.append({"question_id": 100 + index, "image_id": index, "question": f"What colour is thing {index}?"})
        answers = [
            {"answer": text, "answer_confidence": "yes", "answer_id": number}
            for number, text in enumerate(open_answers(index, agreeing), start=1)
        ]
        annotations.append({"question_id": 100 + index, "image_id": index, "answers": answers})
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def vqav2_test_dev(root: Path) -> None:
    rows = []
    for index in range(COUNT):
        name = f"COCO_test2015_{index:012d}.jpg"
        picture(root / "vqav2/test2015" / name, index)
        text = f"What is {index}?\nAnswer the question using a single word or phrase."
        rows.append({"question_id": index, "image": name, "text": text, "category": "default"})
    write(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", lines(rows))


def gqa(root: Path) -> None:
    folder = root / "gqa/data"
    questions = {}
    for index in range(COUNT):
        picture(folder / f"images/n{index}.jpg", index)
        questions[f"20{index}"] = {
            "imageId": f"n{index}",
            "question": f"Is thing {index} red?",
            "answer": "yes" if index % 2 else "no",
            "fullAnswer": "It is.",
        }
    write(folder / "testdev_balanced_questions.json", questions)


def textvqa(root: Path) -> None:
    folder = root / "textvqa"
    rows, listed = [], []
    for index, agreeing in enumerate(AGREEING):
        picture(folder / f"train_images/t{index}.jpg", index)
        question = f"what does sign {index} say?"
        answers = open_answers(index, agreeing)
        rows.append({"question_id": index, "image_id": f"t{index}", "question": question, "answers": answers})
        text = f"{question}\nReference OCR token: STOP, {index}\nAnswer the question using a single word or phrase."
        listed.append({"question_id": f"t{index}", "image": f"train_images/t{index}.jpg", "text": text})
    write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    write(folder / "llava_textvqa_val_v051_ocr.jsonl", lines(listed))


def vizwiz(root: Path) -> None:
    rows = []
    for index, agreeing in enumerate(AGREEING):
        name = f"VizWiz_val_{index:08d}.jpg"
        picture(root / "vizwiz/val" / name, index)
        answers = [{"answer": text, "answer_confidence": "yes"} for text in open_answers(index, agreeing)]
        rows.append({"image": name, "question": f"what is {index}", "answers": answers, "answer_type": "other"})
    write(root / "vizwiz/val.json", rows)


def pope(root: Path) -> None:
    number = 0
    for category, count in (("adversarial", 4), ("popular", 2), ("random", 2)):
        rows = []
        for index in range(count):
            name = f"COCO_val2014_{number:012d}.jpg"
            picture(root / "pope/val2014" / name, number)
            label = "no" if index % 2 else "yes"
            rows.append({"question_id": index + 1, "image": name, "text": f"Is there a {number}?", "label": label})
            number += 1
        write(root / f"pope/coco/coco_pope_{category}.json", lines(rows))


def mme(root: Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    for index in range(2):
        picture(release / f"existence/{index}.jpg", index)
        text = f"Is there {index}? Please answer yes or no.\tYes\nIs there none? Please answer yes or no.\tNo\n"
        write(release / f"existence/{index}.txt", text)
        # The other form: images and texts apart.
        picture(release / f"code_reasoning/images/{index}.png", index)
        write(release / f"code_reasoning/questions_answers_YN/{index}.txt", text)


def mmbench(root: Path, folder: str = "mmbench", name: str = "mmbench_dev_20230712.tsv") -> None:
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow([*header, "comment", "split"])
        for index in (1, 2, 3, 4, 5, 6, 1000001, 1000002):
            circular = index > 1000000
            options = ["dog", "cat", "", ""] if circular else ["cat", "dog", "", ""]
            answer = "B" if circular else "A"
            # A circular pass may name the row whose picture it shares.
            image = str(index - 1000000) if circular else encoded(index)
            hint = "Look closely." if index == 1 else ""
            row = [index, f"Which animal {index}?", hint, *options, answer, "animals", image, "made", "nature"]
            table.writerow([*row, "", "dev"])


def scienceqa(root: Path) -> None:
    problems = {}
    for index in range(COUNT + 1):
        with_image = index < COUNT
        problems[str(index)] = {
            "question": f"Which is {index}?",
            "choices": ["one", "two", "three"],
            "answer": 1,
            "hint": "A hint." if index == 0 else "",
            "image": "image.png" if with_image else None,
            "split": "test",
        }
        if with_image:
            picture(root / f"scienceqa/images/test/{index}/image.png", index)
    write(root / "scienceqa/problems.json", problems)
    write(root / "scienceqa/pid_splits.json", {"train": [], "test": list(problems)})


def seedbench(root: Path) -> None:
    folder = root / "seed_bench"
    rows = []
    for index in range(COUNT + 1):
        video = index >= 6
        rows.append(
            {
                "question_id": str(index),
                "question": f"What is {index}?",
                **{f"choice_{letter}": f"{letter}{index}" for letter in "abcd"},
                "answer": "B",
                "data_type": "video" if video else "image",
                "data_id": f"clip{index}.mp4" if video else f"data{index}",
                "question_type_id": 10 if video else 1,
            }
        )
        if index < 6:
            picture(folder / f"SEED-Bench-image/data{index}", index)
        elif index < COUNT:
            picture(folder / f"SEED-Bench-video-image/{index}.png", index)
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": {}})


def mmvp(root: Path) -> None:
    rows = ["Index,Question,Options,Correct Answer\n"]
    for index in range(1, COUNT + 1):
        picture(root / f"mmvp/MMVP Images/{index}.jpg", index)
        rows.append(f"{index},Is it open?,(a) Open (b) Closed,({'a' if index % 2 else 'b'})\n")
    write(root / "mmvp/Questions.csv", "".join(rows))


def cvbench(root: Path) -> None:
    folder = root / "cvbench"
    for part, sources in (("2d", ("ADE20K", "ADE20K", "COCO", "COCO")), ("3d", ("Omni3D",) * 4)):
        rows = []
        for index, source in enumerate(sources):
            name = f"img/{part}/{index}.png"
            picture(folder / name, index)
            prompt = f"How many are there in {index}? Select from the following choices.\n(A) 1\n(B) 2"
            row = {"idx": index, "type": part.upper(), "task": "Count", "question": f"How many in {index}?"}
            row |= {"choices": ["1", "2"], "answer": "(B)", "prompt": prompt, "filename": name, "source": source}
            rows.append(row)
        write(folder / f"test_{part}.jsonl", lines(rows))


def cvbench_parquet(root: Path) -> None:
    """CV-Bench as the hub has it: pictures inside the table."""
    import pyarrow
    import pyarrow.parquet

    for part in ("2d", "3d"):
        path = root / f"cvbench/test_{part}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["image"] = {"bytes": (root / "cvbench" / row["filename"]).read_bytes(), "path": None}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"cvbench/test_{part}.parquet")
        path.unlink()


def realworldqa(root: Path) -> None:
    rows = []
    for index in range(COUNT):
        picture(root / f"realworldqa/{index}.webp", index)
        answer = "B" if index < 5 else str(index)
        rows.append({"image": f"{index}.webp", "question": f"Where is {index}?\n\nA. Left\nB. Right", "answer": answer})
    write(root / "realworldqa/annotations.jsonl", lines(rows))


def mmvet(root: Path) -> None:
    entries = {}
    for index in range(COUNT):
        picture(root / f"mm-vet/images/v1_{index}.png", index)
        entry = {"imagename": f"v1_{index}.png", "question": f"What is in {index}?", "answer": "a<AND>b"}
        entries[f"v1_{index}"] = {**entry, "imagesource": "https://example.com", "capability": ["ocr", "math"]}
    write(root / "mm-vet/mm-vet.json", json.dumps(entries))


def llava_bench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    rows: dict[str, list[dict]] = {"questions": [], "context": [], "answers_gpt4": []}
    for index in range(COUNT):
        name = f"{index:03d}.jpg"
        picture(folder / "images" / name, index)
        question = {"question_id": index, "image": name, "text": f"What about {index}?"}
        rows["questions"].append({**question, "category": ("conv", "detail", "complex")[index % 3]})
        rows["context"].append({"id": f"{index:03d}", "image": name, "caption": f"A caption of {index}."})
        rows["answers_gpt4"].append({"question_id": index, "text": f"GPT-4 says {index}."})
    for name, found in rows.items():
        write(folder / f"{name}.jsonl", lines(found))


BUILDERS = (
    mmvet,
    llava_bench,
    vqav2,
    vqav2_test_dev,
    gqa,
    textvqa,
    vizwiz,
    pope,
    mme,
    mmbench,
    scienceqa,
    seedbench,
    mmvp,
    cvbench,
    realworldqa,
)


def build_all(root: Path) -> Path:
    """Every benchmark below `root`."""
    for build in BUILDERS:
        build(root)
    mmbench(root, "mmbench_cn", "mmbench_dev_cn_20231003.tsv")
    return root
