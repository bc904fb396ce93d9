"""The sparsification stage of one run, from its resolved configuration to its checkpoint."""

from __future__ import annotations

import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..carried_code import add_code
from ..checkpoints import load_checkpoint
from ..checkpoints.chat_template import ASSISTANT, USER, marker_ids
from ..data import ConversationDataset, LlavaCollator, MixtureDataset, open_dataset
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..reading import read_json_object
from ..screen import hush_libraries
from ..weight_checks import mark_untrained, noting_new
from .checkpointing import (
    best_of,
    check_same_config,
    checkpoints,
    copy_model,
    drop_later_lines,
    is_finished,
    newest_valid,
    remove_unfinished,
    run_lock,
    write_errors,
)
from .config import StageConfig
from .gradients import gradient_report
from .interruption import EvaluationStopped, StopOnSignal
from .lora import add_adapters, quantization
from .monitoring import KeptPatches, examples_of
from .output_rate import calibrate, learns_outputs, summary
from .preflight import check_build_locks, check_judged, check_machine
from .processor import stage_processor
from .progress import METRICS_FILE, show_lines
from .trainer import MetricsFile, StageTrainer, freeze


def build_model(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base checkpoint with the run's sparsity; frozen parts frozen, with adapters where LoRA is asked for."""
    sparsity = asdict(config.sparsity)
    # What was trained is told by the base.
    del sparsity["untrained"]
    if config.sparsity.instruct_predictor:
        sparsity |= {"user_marker": marker_ids(tokenizer, USER), "assistant_marker": marker_ids(tokenizer, ASSISTANT)}
    quantized = quantization(config.model)
    # That predictors are new is what the stage is for, and no news.
    with noting_new() as new:
        model = load_checkpoint(
            config.model.base_model,
            sparsity=sparsity,
            attn_implementation=config.model.attn_implementation,
            dtype=config.model.weight_dtype(config.training),
            **({} if quantized is None else {"quantization_config": quantized}),
        )
    mark_untrained(model.config.sparsity, new)
    if config.model.lora_r:
        # Adapters start alike however many numbers the loading has drawn: with ZeRO-3 it draws more.
        set_seed(config.training.seed)
        return add_adapters(model, config.model, config.training.gradient_checkpointing)
    freeze(model, train_projector=config.model.train_projector, train_decoder=config.model.train_decoder)
    return model


def open_data(config: StageConfig, processor, files: list[str] | None = None) -> ConversationDataset | MixtureDataset:
    """The training data of a stage, or with `files` other data under the same settings."""
    return open_dataset(
        files or config.data.train_file,
        config.data.image_folder,
        processor,
        seed=config.training.seed,
        max_length=config.data.max_length,
        on_bad_sample=config.data.on_bad_sample,
        require_image=config.data.require_image,
        output_turns=config.data.output_turns,
    )


def report_gradients(config: StageConfig, batches: int) -> list[dict[str, float]]:
    """Gradients at the predictors of the stage's first batches, at its first temperature; nothing is trained."""
    # The model is whole here, whatever engine would train it.
    unset_hf_deepspeed_config()
    hush_libraries()
    args = config.training
    set_seed(args.seed)
    processor = stage_processor(config)
    loader = torch.utils.data.DataLoader(
        open_data(config, processor),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        collate_fn=LlavaCollator(processor),
    )
    model = build_model(config, processor.tokenizer).train().to(args.device)
    moved = ({key: value.to(args.device) for key, value in batch.items()} for batch in islice(loader, batches))
    return gradient_report(model, moved, args.gumbel_tau_start)


def train(config: StageConfig) -> StageTrainer:
    """Train and save model, processor and resolved configuration into the run's folder."""
    args = config.training
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs; start one for each (scripts/train_stage.sh, torchrun), or let it see "
            "only one (CUDA_VISIBLE_DEVICES)."
        )
    with StopOnSignal() as stop:
        trainer = make_trainer(config, stop)
        with run_lock(Path(args.output_dir)) if args.should_save else nullcontext():
            run_trainer(trainer, config, stop)
    _say_skipped(trainer.train_dataset, args.process_index)
    return trainer


def make_trainer(config: StageConfig, stop: StopOnSignal) -> StageTrainer:
    """The trainer of a stage with its data and its model; what can be refused without the model is refused first."""
    args = config.training
    check_machine(args)
    hush_libraries(args.get_process_log_level())
    # Pinned memory serves the way to a device.
    args.dataloader_pin_memory &= args.device.type != "cpu"
    set_seed(args.seed)
    processor = stage_processor(config)
    dataset = open_data(config, processor)
    held_out = open_data(config, processor, config.data.eval_file) if config.data.eval_file else None
    check_judged(config, dataset)
    if args.deepspeed:
        check_build_locks()
        if torch.distributed.is_initialized():
            # ZeRO-3 shards the weights while they are loaded, before Trainer tells DeepSpeed about the ranks.
            import deepspeed

            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    pictures = []
    if args.picture_steps:
        examples = examples_of(held_out or dataset)
        pictures = [KeptPatches(examples, processor, args.picture_steps)]
    trainer = StageTrainer(
        model=build_model(config, processor.tokenizer),
        args=args,
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=WithIds(LlavaCollator(processor)),
        processing_class=processor,
        callbacks=[MetricsFile(), stop, *pictures],
        run_config=config.fixed_values(),
    )
    show_lines(trainer)
    return trainer


def run_trainer(trainer: StageTrainer, config: StageConfig, stop: StopOnSignal) -> None:
    """Train from where the run's folder stands to the end, or to a signal."""
    args, run = config.training, Path(config.training.output_dir)
    with args.main_process_first(desc="looking for a checkpoint"):
        found = resume_point(config)
    if args.should_save:
        config.save(run)
    if found is not None and is_finished(found):
        # Trainer would go one step further.
        if args.should_save:
            copy_model((best_of(found) if args.load_best_model_at_end else None) or found, run)
            if not config.model.lora_r:
                add_code(run, DynamicLlavaForConditionalGeneration)
        calibrate_run(trainer)
        return
    with suppress(EvaluationStopped):
        # Raised here alone by the evaluation in front of the first step.
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if stop.stopped:
        if args.process_index == 0:
            step = trainer.state.global_step
            print(f"Stopped by {stop.asked.name} after step {step}; the same command goes on from there.")
        stop.end()
    with write_errors():
        trainer.save_model(args.output_dir)
    calibrate_run(trainer)


def calibrate_run(trainer: StageTrainer) -> None:
    """Bring the output predictor in the run's folder to its rate, by one process while the others wait."""
    args = trainer.args
    if not args.calibration_answers:
        return
    if args.process_index == 0 and learns_outputs(read_json_object(Path(args.output_dir, "config.json"))):
        # The model is whole here, whatever engine has trained it.
        unset_hf_deepspeed_config()
        with torch.random.fork_rng(), write_errors():
            processor, number = trainer.processing_class, args.calibration_answers
            print(summary(calibrate(args.output_dir, trainer.train_dataset, processor, number, args.device)))
    trainer.accelerator.wait_for_everyone()


def resume_point(config: StageConfig) -> Path | None:
    """The checkpoint to go on from, None at the beginning; leaves the run's folder as it was at that moment.

    Raises:
        ValueError: the checkpoint is of another configuration.
    """
    args, run = config.training, Path(config.training.output_dir)
    found = None if args.restart else newest_valid(run)
    if found is not None:
        check_same_config(found, config.fixed_values())
    if args.should_save:
        for folder in checkpoints(run) if args.restart else remove_unfinished(run):
            shutil.rmtree(folder, ignore_errors=True)
        step = -1 if found is None else int(found.name.rpartition("-")[2])
        drop_later_lines(run / METRICS_FILE, step)
        if found is not None and args.process_index == 0:
            print(f"Going on from {found}.")
    return found


class WithIds:
    """A collator that also hands on the ids of the samples, for messages."""

    def __init__(self, collator) -> None:
        self.collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collator(samples), "ids": [str(sample.get("id")) for sample in samples]}


def _say_skipped(dataset: ConversationDataset | MixtureDataset, rank: int) -> None:
    skipped = gather_object(list(dataset.skipped))
    if skipped and rank == 0:
        first = "; ".join(f"{sample}: {reason}" for sample, reason in skipped[:5])
        print(f"{len(skipped)} samples were skipped. The first: {first}")
