"""Prepared downloads give exact scores under the stock scorers, offline; the model is a book of answers."""

import json
import re
from pathlib import Path

import pytest
from lmms_eval.api.model import lmms
from lmms_eval.llm_judge.protocol import Response

from dynamic_llava.eval.__main__ import main as evaluate
from dynamic_llava.eval.llava_prompts import mmbench_text, vizwiz_text
from dynamic_llava.eval.runner import EvaluationOptions, check_tasks, run_lmms, task_metrics
from eval.benchmarks.prepare import CONVERSIONS, main, prepare

from . import downloads


class AnswerBook(lmms):
    """Answers document i of every task with `answers[i]`; keeps the prompts and the images' shades."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers = answers
        self.prompts: dict[int, str] = {}
        self.shades: dict[int, list[int]] = {}

    def generate_until(self, requests):
        for request in requests:
            prompt, _, visual, doc_id, task, split = request.args
            self.prompts[doc_id] = prompt
            images = visual(self.task_dict[task][split][doc_id])
            self.shades[doc_id] = [image.convert("RGB").getpixel((0, 0))[0] for image in images]
        return [self.answers[request.args[3]] for request in requests]

    def generate_until_multi_round(self, requests):
        raise NotImplementedError

    def loglikelihood(self, requests):
        raise NotImplementedError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return downloads.build_all(tmp_path_factory.mktemp("playground") / "data" / "eval")


@pytest.fixture(scope="module")
def data_root(source, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    for task in CONVERSIONS:
        if task not in ("vizwiz_vqa_test", "mmbench_en_test", "mmbench_cn_test"):
            prepare(task, source, root)
    return root


@pytest.fixture
def score(data_root, tmp_path):
    """Metrics of a task answered by a book, and the book."""

    def run(task: str, answers: list[str], **options):
        options = EvaluationOptions((task,), data_root=str(data_root), **options)
        book = AnswerBook(answers)
        results = run_lmms(book, check_tasks(options), options, tmp_path)
        return task_metrics(results, (task,))[task], book

    return run


# 10, 10, 3, 2, 1, 0, 10, 0 of ten people agree: 1, 1, .9, .6, .3, 0, 1, 0.
OPEN_SCORE = (1 + 1 + 0.9 + 0.6 + 0.3 + 0 + 1 + 0) / 8
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def test_vqav2(score):
    metrics, book = score("vqav2_val", ["Red", "the red.", *["red"] * 6])
    assert metrics["exact_match"] == pytest.approx(OPEN_SCORE)
    assert book.prompts[3] == "What colour is thing 3?" + SHORT_ANSWER
    assert book.shades == {index: [index] for index in range(8)}


def test_vqav2_test_dev_writes_a_submission(score, tmp_path):
    _, book = score("vqav2_test", [f"answer {index}" for index in range(8)])
    (submission,) = (tmp_path / "submissions").glob("vqav2-test-submission-*.json")
    assert json.loads(submission.read_text())[5] == {"question_id": 5, "answer": "answer 5"}
    assert book.prompts[5] == "What is 5?" + SHORT_ANSWER


def test_gqa(score):
    metrics, book = score("gqa", ["No.", "yes", "NO", "yes", "no", "no", "yes", "maybe"])
    assert metrics["exact_match"] == 5 / 8
    assert book.prompts[0] == "Is thing 0 red?" + SHORT_ANSWER
    assert book.shades[7] == [7]


def test_textvqa(score):
    metrics, book = score("textvqa_val", ["Red", "the red", *["red"] * 6])
    assert metrics["exact_match"] == pytest.approx(OPEN_SCORE)
    assert book.prompts[2] == "What does sign 2 say?" + SHORT_ANSWER


def test_textvqa_with_ocr_tokens_is_llavas_prompt(score):
    _, book = score("textvqa_val", ["red"] * 8, llava_prompts=True)
    assert book.prompts[2] == "What does sign 2 say?\nReference OCR token: STOP, 2" + SHORT_ANSWER


def test_vizwiz_as_llava_asks(score):
    _, book = score("vizwiz_vqa_val", ["red"] * 8, llava_prompts=True)
    _, stock = score("vizwiz_vqa_val", ["red"] * 8)
    assert book.prompts[0].splitlines()[1:] == stock.prompts[0].splitlines()[1:]
    assert "insufficient, respond with 'Unanswerable'." in book.prompts[0]
    assert vizwiz_text({"question": "Which TIN is it?"}) == "Which TIN is it?"


@pytest.mark.parametrize(
    ("task", "request_"), [("mmbench_en_dev_static", LETTER), ("mmbench_cn_dev_static", "请直接回答选项字母。")]
)
def test_mmbench_as_llava_asks(score, task, request_):
    metrics, book = score(task, ["A"] * 8, llava_prompts=True)
    stock, other = score(task, ["A"] * 8)
    assert metrics["gpt_eval_score"] == stock["gpt_eval_score"]
    assert book.prompts[0] != other.prompts[0]
    assert book.prompts[0].splitlines()[-1] == request_
    doc = {"hint": "Look up.", "question": "What is it?", "A": "a cat", "B": "a dog", "C": None, "D": "nan"}
    assert mmbench_text("Say it.")(doc) == "Look up.\nWhat is it?\nA. a cat\nB. a dog\nSay it."
    assert mmbench_text("Say it.")({**doc, "hint": None}).startswith("What is it?\nA. a cat")


def test_benchmarks_alike_are_left_alone(score):
    for task in ("gqa", "pope", "scienceqa_img", "seedbench"):
        assert score(task, ["A"] * 8, llava_prompts=True)[1].prompts == score(task, ["A"] * 8)[1].prompts


@pytest.fixture
def judge_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")


def test_mmvet(score, judge_key, monkeypatch):
    asked = {}

    # lmms-eval asks from several threads, in any order.
    def judged(self, request):
        content = request.messages[0]["content"]
        number = int(re.search(r"\| answer (\d) \|$", content)[1])
        asked[number] = content
        return Response(content=f"0.{number + 1}", model_used="judge", usage=None, raw_response=None)

    monkeypatch.setattr("lmms_eval.llm_judge.providers.openai.OpenAIProvider.evaluate", judged)
    metrics, book = score("mmvet", [f"answer {n}" for n in range(8)])
    assert metrics["gpt_eval_score"] == pytest.approx(100 * sum(n / 10 for n in range(1, 9)) / 8)
    assert sorted(asked) == list(range(8))
    assert asked[2].endswith("What is in 2? | a <AND> b | answer 2 |")
    assert book.shades[5] == [5]


def test_llava_bench(score, judge_key, monkeypatch):
    from lmms_eval.verifiers import VerifyResult

    asked = {}

    def judged(*_, content, **__):
        asked[int(re.search(r"answer (\d)", content)[1])] = content
        return VerifyResult(score=0.5, is_correct=False, raw_output="8 4", metadata={"scores": [8.0, 4.0]})

    import lmms_eval.verifiers

    monkeypatch.setattr(lmms_eval.verifiers.VerificationPipeline, "__call__", lambda self, **kw: judged(**kw))
    metrics, book = score("llava_in_the_wild", [f"answer {n}" for n in range(8)])
    assert metrics["gpt_eval_llava_all"] == metrics["gpt_eval_llava_conv"] == 50.0
    assert "[Context]\nA caption of 3." in asked[3]
    assert "GPT-4 says 3." in asked[3]
    assert sorted(asked) == list(range(8))
    assert book.prompts[6] == "What about 6?"


def test_vizwiz(score):
    metrics, _ = score("vizwiz_vqa_val", ["red"] * 8)
    assert metrics["exact_match"] == pytest.approx(OPEN_SCORE)


def test_pope(score):
    # Right: 1, 4, 5, 6, 7; true positives 1, 5, 7; one false positive, one false negative.
    metrics, book = score("pope", ["yes", "yes", "no", "no", "Yes", "no", "yes", "maybe"])
    assert metrics["pope_accuracy"] == 5 / 8
    assert metrics["pope_precision"] == metrics["pope_recall"] == metrics["pope_f1_score"] == 3 / 4
    assert metrics["pope_yes_ratio"] == 1 / 2
    assert book.prompts[4] == "Is there a 4?" + SHORT_ANSWER
    assert book.shades[6] == [6]


def test_pope_by_category(score):
    metrics, _ = score("pope_adv", ["yes", "yes", "no", "no"])
    assert metrics["pope_accuracy"] == metrics["pope_f1_score"] == 1 / 2


def test_mme(score):
    # Documents: two cognition images, then two perception images, two questions each.
    metrics, book = score("mme", ["No", "Yes", "yes", "no", "Yes.", "No.", "Yes", "Yes"])
    assert metrics["mme_cognition_score"] == (0 + 200) / 2
    assert metrics["mme_perception_score"] == (200 + 50) / 2
    assert book.prompts[4] == "Is there 0?" + SHORT_ANSWER


@pytest.mark.parametrize("task", ["mmbench_en_dev_static", "mmbench_cn_dev_static"])
def test_mmbench_static(score, task, tmp_path):
    # Right: 1 in both passes, 3, 4 by its text. 2 fails its second pass, 5 is wrong, 6 names no option.
    answers = ["A", "A", "A.", "It is a cat", "B", "a banana", "B", "A"]
    metrics, book = score(task, answers)
    assert metrics["gpt_eval_score"] == 50
    assert book.prompts[0].startswith("Look closely. Which animal 1? ")
    assert book.prompts[1].startswith("Which animal 2? ")
    assert "A. cat\nB. dog\n" in book.prompts[1]
    assert "C." not in book.prompts[1]
    assert book.shades[6] == [1], "the second pass shares the picture of the first"
    assert list((tmp_path / "submissions").glob("*.xlsx"))


def test_scienceqa(score):
    metrics, book = score("scienceqa_img", ["B", "b", "B. two", "B", "B", "A", "C. three", "two"])
    assert metrics["exact_match"] == 5 / 8
    assert book.prompts[0] == f"Context: A hint.\nWhich is 0?\nA. one\nB. two\nC. three\n{LETTER}"


def test_scienceqa_full_has_questions_without_image(score):
    metrics, book = score("scienceqa", ["B"] * 9)
    assert metrics["exact_match"] == 1
    assert book.shades[8] == []


def test_seedbench(score):
    metrics, book = score("seedbench", ["B", "b.", "B", "B. b3", "A", "C", "B", "D"])
    assert metrics["seed_image"] == 4 / 6
    assert metrics["seed_video"] == 1 / 2
    assert metrics["seed_all"] == 5 / 8
    assert book.prompts[0] == f"What is 0?\nA. a0\nB. b0\nC. c0\nD. d0\n{LETTER}"
    assert book.shades[7] == [7]


def test_mmvp(score):
    metrics, book = score("mmvp", ["A", "(b)", "A", "A", "B", "A", "a.", "The answer is B"])
    assert metrics["mmvp_accuracy"] == 5 / 8
    assert metrics["mmvp_pair_accuracy"] == 2 / 4
    assert book.prompts[0] == f"Is it open?\nA. Open\nB. Closed\n{LETTER}"


def test_cvbench(score):
    metrics, book = score("cv_bench", ["B", "(B)", "A", "B", "b", "(B) 2", "A", "two"])
    assert metrics["cv_bench_acc"] == 5 / 8
    assert "respond with A, B without" in book.prompts[0]


def test_cvbench_with_pictures_inside_its_table(tmp_path):
    downloads.cvbench(tmp_path)
    downloads.cvbench_parquet(tmp_path)
    path, count = prepare("cv_bench", tmp_path, tmp_path / "out")
    assert count == 8
    assert json.loads(path.read_text().splitlines()[5])["image"] == "images/cv_bench/3d_1.png"
    options = EvaluationOptions(("cv_bench",), data_root=str(tmp_path / "out"))
    book = AnswerBook(["B", "(B)", "A", "B", "b", "(B) 2", "A", "two"])
    results = run_lmms(book, check_tasks(options), options, tmp_path)
    assert task_metrics(results, ("cv_bench",))["cv_bench"]["cv_bench_acc"] == 5 / 8
    assert book.shades[6] == [2]


def test_realworldqa(score):
    metrics, book = score("realworldqa", ["B", "B. Right", "A", "(B)", "A", "5", "6.", "7"])
    assert metrics["exact_match"] == 6 / 8
    assert book.prompts[1] == "Where is 1?\n\nA. Left\nB. Right"


def test_a_group_of_stock_tasks_reads_local_files(data_root):
    manager = check_tasks(EvaluationOptions(("pope_full",), data_root=str(data_root)))
    assert sorted(manager.local) == ["pope_adv", "pope_pop", "pope_random"]


def test_evaluation_from_the_command_line(run_folder, data_root, tmp_path):
    arguments = ["--model", str(run_folder), "--tasks", "gqa,cvbench", "--limit", "3", "--data-root", str(data_root)]
    assert evaluate([*arguments, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["metrics"]) == ["gqa", "cv_bench"]
    assert results["options"]["data_root"] == str(data_root)
    records = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [record["image_tokens"] for record in records] == [64] * 6


def test_command_prepares_what_is_there(tmp_path, capsys):
    downloads.gqa(tmp_path / "in")
    assert main(["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gqa.jsonl"]
    said = capsys.readouterr()
    assert "gqa: 8 documents" in said.out
    assert "pope: left out" in said.err


def test_a_scorer_that_fails_says_why(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    text = (data_root / "pope.jsonl").read_text().replace('"answer": "no"', '"answer": "perhaps"')
    rows = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "pope.jsonl").write_text(
        downloads.lines({**row, "image": str(data_root / row["image"])} for row in rows)
    )
    options = EvaluationOptions(("pope",), data_root=str(tmp_path))
    with pytest.raises(ValueError, match=r"could not read or score pope: AssertionError"):
        run_lmms(AnswerBook(["yes"] * 8), check_tasks(options), options, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pope"], ["coco_pope_adversarial.json"]),
        (["popee"], ["popee", "textvqa_val"]),
        ([], ["none of the benchmarks"]),
    ],
)
def test_command_says_what_is_missing(tmp_path, capsys, arguments, words):
    assert main([*arguments, "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_command_needs_the_source(tmp_path, capsys):
    assert main(["--source", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_missing_image_is_named_when_preparing(tmp_path):
    downloads.gqa(tmp_path)
    (tmp_path / "gqa/data/images/n3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"n3\.jpg"):
        prepare("gqa", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "gqa.jsonl").exists()


def test_foreign_file_is_named_when_preparing(tmp_path):
    downloads.gqa(tmp_path)
    (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text('{"1": {"question": "?"}}')
    with pytest.raises(ValueError, match=r"gqa.*imageId"):
        prepare("gqa", tmp_path, tmp_path / "out")
    (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text("{")
    with pytest.raises(ValueError, match=r"testdev_balanced_questions\.json is not valid JSON"):
        prepare("gqa", tmp_path, tmp_path / "out")


def test_no_file_for_a_task_names_the_command(tmp_path):
    options = EvaluationOptions(("gqa",), data_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"gqa\.jsonl.*python eval/prepare_data\.py gqa"):
        check_tasks(options)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda row: {**row, "answer": ""}, ValueError, r"line 3.*'answer'"),
        (lambda row: {**row, "image": "images/none.png"}, FileNotFoundError, r"line 3.*images/none\.png"),
        (lambda row: [row], ValueError, "line 3 is list"),
    ],
)
def test_bad_documents_are_named_before_a_model_is_loaded(data_root, tmp_path, change, error, words):
    rows = [json.loads(line) for line in (data_root / "gqa.jsonl").read_text().splitlines()]
    rows[2] = change(rows[2])
    (tmp_path / "gqa.jsonl").write_text(downloads.lines(rows))
    with pytest.raises(error, match=words):
        check_tasks(EvaluationOptions(("gqa",), data_root=str(tmp_path)))


def test_ocr_tokens_are_needed_where_they_are_asked_for(source, tmp_path):
    downloads.textvqa(tmp_path)
    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").unlink()
    prepare("textvqa_val", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no OCR tokens"):
        check_tasks(EvaluationOptions(("textvqa_val",), data_root=str(tmp_path), llava_prompts=True))
