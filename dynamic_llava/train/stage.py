"""The sparsification stage of one run, from its resolved configuration to its checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase, set_seed

from .. import DynamicLlavaForConditionalGeneration
from ..chat_template import ASSISTANT, USER, marker_ids
from ..checkpoints import load_checkpoint, load_processor
from ..data.collator import LlavaCollator
from ..data.dataset import LlavaJsonDataset
from .arguments import StageConfig
from .trainer import MetricsFile, StageTrainer, freeze


def build_model(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> DynamicLlavaForConditionalGeneration:
    """The base checkpoint with the run's sparsity; frozen parts frozen."""
    sparsity = asdict(config.sparsity)
    if config.sparsity.instruct_predictor:
        sparsity |= {"user_marker": marker_ids(tokenizer, USER), "assistant_marker": marker_ids(tokenizer, ASSISTANT)}
    model = load_checkpoint(
        config.model.base_model,
        sparsity=sparsity,
        attn_implementation=config.model.attn_implementation,
        dtype="auto",
    )
    freeze(model, train_projector=config.model.train_projector, train_decoder=config.model.train_decoder)
    return model


def train(config: StageConfig) -> StageTrainer:
    """Train and save model, processor and resolved configuration into the run's folder."""
    args = config.training
    set_seed(args.seed)
    processor = load_processor(config.model.base_model)
    dataset = LlavaJsonDataset(
        config.data.train_file,
        config.data.image_folder,
        processor,
        max_length=config.data.max_length,
        on_bad_sample=config.data.on_bad_sample,
        require_image=config.data.require_image,
        image_aspect_ratio="pad" if config.data.image_aspect_ratio == "pad" else None,
    )
    trainer = StageTrainer(
        model=build_model(config, processor.tokenizer),
        args=args,
        train_dataset=dataset,
        data_collator=LlavaCollator(processor),
        processing_class=processor,
        callbacks=[MetricsFile()],
    )
    config.save(args.output_dir)
    Path(args.output_dir, "metrics.jsonl").unlink(missing_ok=True)
    trainer.train()
    trainer.save_model(args.output_dir)
    _say_skipped(dataset)
    return trainer


def _say_skipped(dataset: LlavaJsonDataset) -> None:
    if dataset.skipped:
        first = "; ".join(f"{sample}: {reason}" for sample, reason in list(dataset.skipped)[:5])
        print(f"{len(dataset.skipped)} samples were skipped. The first: {first}")
