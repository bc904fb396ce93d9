"""What a run ends with: on a signal, at its end, and where it has nothing to learn from."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.checkpoints import load_adapter, load_checkpoint
from dynamic_llava.data.shapes import build_shapes
from dynamic_llava.train import stage, trainer
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpointing import newest_valid
from dynamic_llava.train.interruption import StopOnSignal
from dynamic_llava.train.monitoring import group_norms

from .test_resume import CONFIG, STEPS, assert_same_outcome
from .test_stage import ROOT, config_of, overrides

SCORES = {2: 3.0, 4: 1.0, 6: 2.0}


@pytest.fixture(autouse=True)
def signals_that_arrive():
    """A shell that runs tests in the background has SIGINT and SIGHUP ignored, and so would the runs here."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    return build_shapes(folder, seed=1, train_pictures=8, val_pictures=1, test_pictures=1)


def scored(shapes, **values) -> dict:
    """Keys of a run of six steps that is saved and scored every two of them."""
    held_out = json.loads((shapes / "train.json").read_text())[:2]
    (shapes / "held_out.json").write_text(json.dumps(held_out))
    values = {"eval_file": shapes / "held_out.json", "eval_strategy": "steps", "eval_steps": 2, **values}
    return {**STEPS, "per_device_eval_batch_size": 1, "warmup_steps": 0, **values}


def arguments(shapes, output, **values) -> list[str]:
    return ["--config", CONFIG, *overrides(shapes, output, **scored(shapes, **values))]


@pytest.fixture(scope="module")
def straight(shapes, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(shapes, run)) == 0
    return run


def evaluations(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], "eval_loss": line["eval_loss"]} for line in lines if "eval_loss" in line]


def kill_in(method: str, step: int, numbers, monkeypatch) -> None:
    """Let the next run get signals when it is in `method` of the trainer at a step."""
    original, left = getattr(trainer.StageTrainer, method), list(numbers)

    def wrapped(self, *args, **kwargs):
        while left and self.state.global_step == step:
            os.kill(os.getpid(), left.pop(0))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, method, wrapped)


@pytest.mark.parametrize(
    ("number", "status", "method", "saved"),
    [
        (signal.SIGTERM, 0, "training_step", 3),
        (signal.SIGHUP, 129, "training_step", 3),
        (signal.SIGINT, 130, "prediction_step", 2),
        (signal.SIGUSR1, 0, "prediction_step", 2),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    shapes, straight, tmp_path, monkeypatch, capsys, number, status, method, saved
):
    """In a step, and in an evaluation, which is made up for."""
    run = tmp_path / "run"
    kill_in(method, 2, [number], monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(arguments(shapes, run))
    monkeypatch.undo()
    assert end.value.code == status
    assert f"Stopped by {signal.Signals(number).name} after step {saved}" in capsys.readouterr().out
    assert newest_valid(run).name == f"checkpoint-{saved}"
    assert not (run / "model.safetensors").exists()
    assert main(arguments(shapes, run)) == 0
    assert_same_outcome(run, straight)
    assert evaluations(run) == evaluations(straight)


def test_a_second_ctrl_c_ends_at_once(shapes, tmp_path, monkeypatch):
    kill_in("training_step", 1, [signal.SIGINT, signal.SIGINT], monkeypatch)
    assert main(arguments(shapes, tmp_path / "run")) == 130
    assert newest_valid(tmp_path / "run") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_the_model_is_loaded(shapes, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(stage, "build_model", lambda *_: os.kill(os.getpid(), number))
    assert main(arguments(shapes, tmp_path / "run")) == 128 + number
    assert capsys.readouterr().err.count("interrupted") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_final_save_does_no_harm(shapes, straight, tmp_path, monkeypatch, number):
    kill_in("_save", 6, [number], monkeypatch)
    assert main(arguments(shapes, tmp_path / "run", save_strategy="no", save_steps="null")) == 0
    one, two = (load_file(run / "model.safetensors") for run in (tmp_path / "run", straight))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_is_ignored_stays_ignored_and_handlers_come_back():
    """`nohup` starts a run that a closed terminal does not end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) == stop._ask
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert stop.asked is None
    assert signal.getsignal(signal.SIGTERM) == terminate


def score_by_step(monkeypatch) -> None:
    original = trainer.StageTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        return {**original(self, *args, **kwargs), "eval_loss": SCORES[self.state.global_step]}

    monkeypatch.setattr(trainer.StageTrainer, "evaluate", evaluate)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_best_model_is_what_a_run_ends_with(shapes, tmp_path, monkeypatch, lora_r):
    """Also where one checkpoint is kept, after a stop, and where the finished run is started again."""
    score_by_step(monkeypatch)
    run, moved = tmp_path / "run", tmp_path / "moved"
    values = {"load_best_model_at_end": "true", "save_total_limit": 1, "lora_r": lora_r}
    kill_in("training_step", 4, [signal.SIGTERM], monkeypatch)
    with pytest.raises(SystemExit):
        main(arguments(shapes, run, **values))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    run.rename(moved)
    assert main(arguments(shapes, moved, **values)) == 0
    name = "adapter_model.safetensors" if lora_r else "model.safetensors"
    best, last, final = (load_file(moved / part / name) for part in ("checkpoint-4", "checkpoint-6", ""))
    assert all(torch.equal(value, best[key]) for key, value in final.items())
    assert not all(torch.equal(value, last[key]) for key, value in final.items())
    (moved / name).unlink()
    assert main(arguments(shapes, moved, **values)) == 0
    assert all(torch.equal(value, best[key]) for key, value in load_file(moved / name).items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_best_model_at_end": "true", "eval_steps": 1}, "save_steps=2 and eval_steps=1 differ"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model must be loss or perplexity, got 'accuracy'"),
        ({"save_only_model": "true"}, "save_only_model=True has no effect here: a run cannot go on"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be a number above 0"),
        ({"dataloader_drop_last": "true", "per_device_train_batch_size": 64}, "make no batch"),
    ],
)
def test_what_cannot_end_well_does_not_begin(shapes, tmp_path, capsys, values, message):
    assert main(arguments(shapes, tmp_path / "run", **values)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("max_grad_norm", [1.0, 0])
def test_rates_and_norms_are_those_of_their_own_step(shapes, tmp_path, monkeypatch, max_grad_norm):
    """By what the optimizer steps with; the gradients here are scaled, as fp16's are."""
    used, norms = [], []
    original = trainer.StageTrainer.create_optimizer

    def create_optimizer(self, *args):
        optimizer = original(self, *args)

        def note(optimizer, *_):
            used.append([group["lr"] for group in optimizer.param_groups])
            grads = ([p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups)
            norms.append([float(torch.nn.utils.get_total_norm(group)) for group in grads])

        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(trainer.StageTrainer, "create_optimizer", create_optimizer)
    values = {"max_steps": 4, "logging_steps": 1, "max_grad_norm": max_grad_norm}
    stage.train(config_of(shapes, tmp_path / "run", **values))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lm_loss" in line]
    assert [[line["learning_rate"], line["predictor_learning_rate"]] for line in steps] == used
    assert len({rate for rates in used for rate in rates}) > 4
    logged = [[line["grad_norm_decoder"], line["grad_norm_predictors"]] for line in steps]
    if max_grad_norm == 0:
        assert logged == [pytest.approx(row) for row in norms]
    for line, row in zip(steps, logged, strict=True):
        assert line["grad_norm"] == pytest.approx(sum(norm**2 for norm in row) ** 0.5, rel=1e-4)


def test_a_base_with_vicunas_generation_settings_is_saved(shapes, tmp_path):
    """It has a temperature without `do_sample`, which transformers loads and does not save."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "assets" / "tiny-llava", base)
    settings = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    values = {"base_model": base, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    stage.train(config_of(shapes, tmp_path / "run", **values))
    assert newest_valid(tmp_path / "run").name == "checkpoint-1"
    assert load_checkpoint(tmp_path / "run").generation_config.eos_token_id == 2


def test_norms_of_scaled_gradients():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert group_norms(optimizer, scaler) == {"grad_norm_predictors": 5.0}
    assert group_norms(optimizer) == {"grad_norm_predictors": 5.0 * 1024}


def short(shapes, tmp_path, words: int = 3):
    """Data whose answers are short, and of which the last is."""
    rows = json.loads((shapes / "train.json").read_text())
    for row in rows:
        row["conversations"][-1]["value"] = "a " * words
    (tmp_path / "short.json").write_text(json.dumps(rows))
    return tmp_path / "short.json"


@pytest.mark.parametrize("weight", ["", ":0.5"])
def test_a_predictor_that_would_see_nothing_is_refused(shapes, tmp_path, capsys, weight):
    file = short(shapes, tmp_path)
    words = overrides(shapes, tmp_path / "run", train_file=f"{file}{weight}")
    for flags in ([], ["--dry-run"]):
        assert main(["--config", CONFIG, *flags, *words]) == 2
        printed = capsys.readouterr()
        error = " ".join(printed.err.split())
        assert "output predictor would never learn: no last answer" in error
        assert all(remedy in error for remedy in ("output_turns=all", "min_output_length", "output_predictor=false"))
    assert "judged answers 0 of" in printed.out
    rows = json.loads(file.read_text())
    for row in rows:
        row.pop("image", None)
        for turn in row["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    file.write_text(json.dumps(rows))
    assert main(["--config", CONFIG, *words, "min_output_length=1"]) == 2
    assert "image predictor would never learn" in capsys.readouterr().err
    assert main(["--config", CONFIG, *words, "min_output_length=1", "image_predictor=false", "max_steps=1"]) == 0


def test_a_predictor_that_never_learned_says_so(shapes, tmp_path, monkeypatch):
    """From a base without predictors, over a run that reaches one of two, to a run that reaches the other."""
    base = load_checkpoint(ROOT / "assets" / "tiny-llava")
    assert base.config.sparsity.untrained == ["image_predictor", "output_predictor"]
    monkeypatch.setattr(stage, "check_judged", lambda *_: None)
    file = short(shapes, tmp_path)
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    stage.train(config_of(shapes, tmp_path / "one", train_file=file, **values))
    for folder in ("one", "one/checkpoint-1"):
        assert load_checkpoint(tmp_path / folder).config.sparsity.untrained == ["output_predictor"]
    # Neither a whole configuration nor one that goes on loses the record.
    sparsity = config_of(shapes, tmp_path).sparsity
    assert load_checkpoint(tmp_path / "one", sparsity=sparsity).config.sparsity.untrained == ["output_predictor"]
    stage.train(config_of(shapes, tmp_path / "two", base_model=tmp_path / "one", train_file=file, max_steps=1))
    assert load_checkpoint(tmp_path / "two").config.sparsity.untrained == ["output_predictor"]
    values = {"base_model": tmp_path / "two", "max_steps": 1, "min_output_length": 1}
    stage.train(config_of(shapes, tmp_path / "three", train_file=file, **values))
    assert load_checkpoint(tmp_path / "three").config.sparsity.untrained == []


def test_an_adapter_brings_its_predictors_and_their_record(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "check_judged", lambda *_: None)
    config = config_of(shapes, tmp_path / "run", train_file=short(shapes, tmp_path), lora_r=4, max_steps=1)
    stage.train(config)
    assert load_adapter(tmp_path / "run").config.sparsity.untrained == ["output_predictor"]
    assert load_checkpoint(tmp_path / "run").config.sparsity.untrained == ["output_predictor"]
