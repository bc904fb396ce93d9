"""The paper's generation benchmarks: built by their rules, held as conversations, scored by METEOR and perplexity."""

from __future__ import annotations

import json
import random
import shutil
import sys

import pytest
import torch
from PIL import Image

from dynamic_llava import SparseCache
from dynamic_llava.checkpoints.loaded import SparsitySettings, load_model
from dynamic_llava.data.prompts import encode_prompts
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.conversation_files import conversation_files
from dynamic_llava.eval.conversations import next_question, read_documents
from dynamic_llava.eval.generation_metrics import table_3
from dynamic_llava.eval.meteor import corpus_meteor, meteor, require_wordnet
from dynamic_llava.eval.multi_round import Conversation, between_turns, hold_conversations
from dynamic_llava.eval.names import OWN_TASKS
from dynamic_llava.eval.perplexity import AnswerScores, SampleScore, score_answers
from eval.benchmarks.generation import MANIFEST
from eval.benchmarks.generation import main as build

from .generation_data import TASKS, conversation, shorter_tasks, write_downloads
from .wordnet import write_wordnet

pytest.importorskip("nltk")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return write_downloads(tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def built(downloads, tmp_path_factory):
    output = tmp_path_factory.mktemp("built")
    assert build(arguments_of(downloads, output, "--allow-fewer")) == 0
    return output


@pytest.fixture(scope="session", autouse=True)
def wordnet(tmp_path_factory):
    """nltk reads its data path once, so it is set for the whole session."""
    import nltk

    folder = str(write_wordnet(tmp_path_factory.mktemp("nltk")))
    nltk.data.path.insert(0, folder)
    yield
    nltk.data.path.remove(folder)


def arguments_of(downloads, output, *more: str) -> list[str]:
    files = ["--lvis", str(downloads / "lvis.json"), "--sharegpt4v", str(downloads / "sharegpt4v.json")]
    return [*files, "--image-folder", str(downloads / "none"), str(downloads), "--output", str(output), *more]


@pytest.fixture
def dense(dense, monkeypatch):
    """The random stock model, which would write image tokens too."""
    monkeypatch.setattr(dense.model.generation_config, "suppress_tokens", [4])
    return dense


@pytest.fixture(scope="module")
def half_folder(run_folder, shapes_folder, tmp_path_factory):
    """The random run with an output predictor that drops about half of the tokens of any text."""
    loaded = load_model(run_folder, device="cpu")
    loaded.model.generation_config.suppress_tokens = [4]
    ids = torch.randint(5, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        keep_logits = loaded.model(input_ids=ids, labels=ids).output_keep_logits.flatten(0, -2)
        last = [
            m for m in loaded.model.model.language_model.output_predictor.modules() if isinstance(m, torch.nn.Linear)
        ][-1]
        last.bias[0] -= (keep_logits[:, 0] - keep_logits[:, 1]).median()
    folder = tmp_path_factory.mktemp("half")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(half_folder):
    return load_model(half_folder, device="cpu")


class TestBuilding:
    def test_what_fits_the_rules(self, built):
        manifest = json.loads((built / MANIFEST).read_text())["benchmarks"]
        found = {name: sorted(entry["ids"]) for name, entry in manifest.items()}
        assert found == {
            "lvis_vqa": ["single-0", "single-1", "single-2", "single-3"],
            "lvis_vqa_multi": ["multi-10", "multi-8", "multi-9"],
            "sharegpt4v_vqa": ["share-1", "share-2", "share-3"],
        }
        for name, entry in manifest.items():
            samples = json.loads((built / f"{name}.json").read_text())
            assert [sample["id"] for sample in samples] == entry["ids"]
            assert len(read_documents(built, conversation_files()[name])) == entry["samples"]

    def test_the_choice_does_not_depend_on_order_place_or_copies(self, downloads, built, tmp_path):
        samples = json.loads((downloads / "lvis.json").read_text())
        samples += samples[1:3]
        random.Random(4).shuffle(samples)
        shutil.copytree(downloads, tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "lvis.json").write_text(json.dumps(samples))
        assert build(arguments_of(tmp_path / "elsewhere", tmp_path / "out", "--allow-fewer")) == 0
        assert (tmp_path / "out" / MANIFEST).read_text() == (built / MANIFEST).read_text()
        assert build(arguments_of(downloads, tmp_path / "seed", "--allow-fewer", "--seed", "1")) == 0
        one, two = (json.loads((folder / MANIFEST).read_text()) for folder in (built, tmp_path / "seed"))
        assert one["benchmarks"]["lvis_vqa"]["sha256"] != two["benchmarks"]["lvis_vqa"]["sha256"]

    def test_too_few_samples(self, downloads, tmp_path, capsys):
        assert build(arguments_of(downloads, tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert "lvis_vqa needs 1000 samples of one round, over 100 words; " in error
        assert "has 4" in error
        assert "--allow-fewer" in error
        assert not (tmp_path / "out").exists()

    def test_missing_pictures_and_files(self, downloads, tmp_path, capsys):
        arguments = arguments_of(downloads, tmp_path / "out", "--allow-fewer")
        place = arguments.index("--image-folder")
        assert build([*arguments[: place + 2], *arguments[place + 3 :]]) == 2
        assert "4 of 4 pictures are in none of" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert build([*arguments[:1], str(tmp_path / "no.json"), *arguments[2:]]) == 2
        assert "no.json is missing" in capsys.readouterr().err
        assert build(["--image-folder", "x", "--output", "y"]) == 2
        assert "Nothing to build from" in capsys.readouterr().err
        (tmp_path / "no.json").write_text('[{"caption": "x"}]')
        assert build([*arguments[:1], str(tmp_path / "no.json"), *arguments[2:]]) == 2
        assert "sample 0 is not a LLaVA conversation" in capsys.readouterr().err


class TestMeteor:
    def test_by_hand(self):
        # Five matches in one chunk: 1 - 0.5 * (1/5)^3; a synonym counts as a match.
        assert meteor("A cat on a bench", "a cat on a bench") == pytest.approx(0.996)
        assert meteor("a cat on a seat", "a cat on a bench") == pytest.approx(0.996)
        # Four of five words in two chunks: mean 0.8, penalty 0.5 * (2/4)^3.
        assert meteor("one cat on dog bench", "one cat on this bench") == pytest.approx(0.8 * (1 - 0.5 / 8))
        # Two of two words said, of four told: P = 1, R = 0.5, mean 0.5 / 0.95, penalty 0.5 * (1/2)^3.
        assert meteor("a cat", "a cat sat down") == pytest.approx(0.5 / 0.95 * (1 - 0.5 / 8))
        assert meteor("", "a cat") == 0

    def test_over_a_corpus(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
        assert corpus_meteor(["a"], ["a"]) is None

    def test_over_a_corpus_with_the_library(self):
        pytest.importorskip("pycocoevalcap")
        if not shutil.which("java"):
            pytest.skip("needs Java")
        assert corpus_meteor(["a cat on a\nbench", "a dog"], ["a cat on a bench", "a dog"]) == pytest.approx(1.0)
        assert corpus_meteor(["a cat on a bench"], ["nothing of that"]) < 0.2

    def test_missing_wordnet_says_how_to_get_it(self, monkeypatch, built, run_folder, capsys):
        import nltk

        monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
        with pytest.raises(FileNotFoundError, match=r"python -m nltk\.downloader wordnet"):
            require_wordnet()
        assert main(["--model", str(run_folder), "--tasks", "lvis_vqa", "--data-root", str(built)]) == 2
        assert "METEOR needs WordNet" in capsys.readouterr().err

    def test_missing_nltk(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nltk", None)
        with pytest.raises(ImportError, match=r"pip install 'dynamic-llava\[meteor\]'"):
            require_wordnet()


QUESTIONS = (["What is there?", "And what else is in it?", "Sure?"], ["Describe it.", "More?"], ["What colour is it?"])


def ask(questions):
    return lambda number, answers: questions[number] if number < len(questions) else None


def held(loaded, chosen, tokens=9, **settings):
    conversations = [
        Conversation(QUESTIONS[n][0], [Image.new("RGB", (128, 128), (60 * n, 90, 30))], ask(QUESTIONS[n]))
        for n in chosen
    ]
    hold_conversations(
        loaded, conversations, {"max_new_tokens": tokens}, loaded.call_kwargs(SparsitySettings(**settings))
    )
    return conversations


def end_early(loaded, monkeypatch) -> None:
    """Let a token that the second conversation writes soon end answers, so that rows of a batch end apart."""
    inputs = encode_prompts(loaded.processor, [QUESTIONS[1][0]], [[Image.new("RGB", (128, 128), (60, 90, 30))]])
    token = int(loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -1])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", token)


class TestConversations:
    @pytest.mark.parametrize("early", [False, True])
    @pytest.mark.parametrize("name", ["dense", "run"])
    def test_a_batch_equals_the_single_conversation(self, name, early, request, monkeypatch):
        loaded = request.getfixturevalue(name)
        if early:
            end_early(loaded, monkeypatch)
        together = held(loaded, [0, 1, 2], 12)
        assert [len(c.answers) for c in together] == [3, 2, 1]
        if early:
            assert len({c.output_tokens / len(c.answers) for c in together}) > 1
        for number, found in enumerate(together):
            (alone,) = held(loaded, [number], 12)
            assert found.answers == alone.answers
            for count in ("prompt_tokens", "image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept"):
                assert getattr(found, count) == getattr(alone, count), (number, count)

    def test_dense_rounds_equal_the_whole_text_read_anew(self, dense):
        """Nothing is dropped: the cache changes nothing."""
        (conversation,) = held(dense, [0])
        processor, picture = dense.processor, conversation.images[0]
        inputs = encode_prompts(processor, [QUESTIONS[0][0]], [[picture]])
        ids = inputs["input_ids"]
        for number, answer in enumerate(conversation.answers):
            sequence = dense.model.generate(
                input_ids=ids, pixel_values=inputs["pixel_values"], max_new_tokens=9, do_sample=False
            )
            said = sequence[:, ids.shape[1] :]
            assert processor.tokenizer.decode(said[0], skip_special_tokens=True).strip() == answer
            if number + 1 < len(QUESTIONS[0]):
                text = between_turns(processor, QUESTIONS[0][number + 1])
                turn = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                ids = torch.cat([sequence, turn], dim=1)
        assert conversation.image_tokens == conversation.image_tokens_kept == 64

    def test_dropped_tokens_stay_dropped(self, run):
        (free,) = held(run, [0])
        (kept,) = held(run, [0], image_keep_rate=1.0, output_sparsity=False)
        assert kept.output_tokens_kept == kept.output_tokens
        assert kept.image_tokens_kept == 64
        assert free.image_tokens_kept == 12
        assert 0 < free.output_tokens_kept < free.output_tokens

    def test_the_text_between_turns(self, run):
        assert between_turns(run.processor, "Why?") == "</s>USER: Why? ASSISTANT:"

    def test_protocol(self):
        doc = {"questions": ["one", "two"]}
        assert next_question(doc) == "one"
        assert next_question(doc, round_idx=1, previous_output=["a"]) == ([], "two", False, ["a"], None)
        assert next_question(doc, round_idx=2, previous_output=["a", "b"]) == ([], None, True, ["a", "b"], None)


def decoded_perplexity(loaded, sample, folder, sparse: bool) -> tuple[float, int]:
    """Negative log likelihood of all answers, token by token on one cache, question by question."""
    processor, total, count = loaded.processor, 0.0, 0
    turns = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
    picture = Image.open(folder / sample["image"]).convert("RGB")
    inputs = encode_prompts(processor, [turns[0]], [[picture]])
    cache = SparseCache(loaded.model.config) if sparse else None
    tokenizer = processor.tokenizer
    with torch.no_grad():
        output = loaded.model(**inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        for number in range(0, len(turns), 2):
            answer = tokenizer(f" {turns[number + 1]}</s>", add_special_tokens=False)["input_ids"]
            for place, token in enumerate(answer):
                total -= output.logits[0, -1].double().log_softmax(-1)[token].item()
                count += 1
                if place + 1 < len(answer):
                    output = loaded.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            if number + 2 < len(turns):
                text = between_turns(processor, turns[number + 2])
                turn = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                output = loaded.model(input_ids=turn, past_key_values=cache, use_cache=True)
    return total, count


@pytest.mark.parametrize("name", ["dense", "run"])
def test_scoring_several_rounds_equals_cached_decoding(name, downloads, tmp_path, request):
    loaded = request.getfixturevalue(name)
    image = "coco/train2017/000000000003.jpg"
    samples = [conversation("a", image, 6, 9, 4), conversation("b", image, 12), conversation("c", image, 3, 7)]
    (tmp_path / "talks.json").write_text(json.dumps(samples))
    scores = score_answers(loaded, tmp_path / "talks.json", downloads, batch_size=3)
    for sample, score in zip(samples, scores.samples, strict=True):
        total, count = decoded_perplexity(loaded, sample, downloads, sparse=name == "run")
        assert score.scored_tokens == count
        assert score.nll / count == pytest.approx(total / count, rel=1e-4)
        # End tokens of earlier answers are fed with the next question, and are not judged.
        assert score.output_tokens == count - len(sample["conversations"]) // 2 + 1
    assert (scores.kept_fraction("output") < 1) == (name == "run")


def test_table_3_by_hand(run, dense):
    sample = SampleScore(
        10.0, 200, 64, 12, output_tokens=200, output_tokens_kept=80, dense_tokens=300, sparse_tokens=128
    )
    scores = AnswerScores((sample,))
    ours, stock = table_3(run, scores), table_3(dense, scores)

    def layer(tokens: int) -> int:
        return 32 * tokens * 64**2 + 4 * tokens**2 * 64

    assert ours["decode_tflops_no_cache"] * 1e12 == pytest.approx(2 * layer(200) + 2 * layer(80))
    # Keys and values of 64 numbers in float32.
    assert ours["kv_megabytes"] * 1e6 == pytest.approx(2 * 64 * 4 * (2 * 200 + 2 * 80))
    assert stock["kv_megabytes"] * 1e6 == pytest.approx(2 * 64 * 4 * 4 * 200)
    assert (ours["output_tokens"], ours["output_tokens_kept"]) == (200, 80)


@pytest.mark.parametrize("name", ["dense_folder", "half_folder"])
def test_the_whole_command(name, built, tmp_path, request, capsys, monkeypatch):
    tasks = shorter_tasks(tmp_path / "tasks", 6)
    arguments = ["--model", str(request.getfixturevalue(name)), "--tasks", "lvis_vqa,lvis_vqa_multi,sharegpt4v_vqa"]
    arguments += ["--data-root", str(built), "--tasks-dir", str(tasks), "--batch-size", "3", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for task, metrics in results["metrics"].items():
        assert 0 <= metrics["meteor"] <= 1, task
        assert metrics["perplexity"] > 1
        assert metrics["kv_megabytes"] > 0
        dropped = metrics["output_tokens_kept"] < metrics["output_tokens"]
        assert dropped == (name == "half_folder")
        assert results["efficiency"][task]["requests"] == (4 if task == "lvis_vqa" else 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_lvis_vqa_multi.jsonl").read_text().splitlines()]
    assert sorted(len(row["filtered_resps"][0]) for row in rows) == [8, 9, 10]

    # Again, from the answers that are there: nothing is generated.
    def never(*_, **__):
        raise AssertionError("generated again")

    monkeypatch.setattr("dynamic_llava.eval.lmms_model.hold_conversations", never)
    monkeypatch.setattr("dynamic_llava.eval.lmms_model.DynamicLlava._answer", never)
    assert main([*arguments, "--output", str(tmp_path / "out"), "--resume"]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert again["efficiency"] == results["efficiency"]


def test_every_task_of_our_own_has_its_file():
    assert set(OWN_TASKS) == set(conversation_files()) == {path.stem for path in TASKS.glob("*.yaml")}


def test_missing_documents_name_the_command(run_folder, tmp_path, capsys):
    assert main(["--model", str(run_folder), "--tasks", "lvis_vqa", "--data-root", str(tmp_path)]) == 2
    assert "python eval/build_generation_benchmarks.py --output" in capsys.readouterr().err


def test_documents_that_are_no_conversations(downloads):
    sample = conversation("a", "coco/train2017/000000000003.jpg", 5)
    for change, message in (
        ({"conversations": sample["conversations"][:1]}, "questions and answers must alternate"),
        ({"conversations": [sample["conversations"][0], {"from": "gpt", "value": " "}]}, "empty question or answer"),
        ({"image": None}, "not LLaVA conversation JSON"),
    ):
        (downloads / "lvis_vqa.json").write_text(json.dumps([{**sample, **change}]))
        with pytest.raises(ValueError, match=message):
            read_documents(downloads, conversation_files()["lvis_vqa"])
