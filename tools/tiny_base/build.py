"""Builds the untrained parts: tokenizer, processor and model."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dynamic_llava.checkpoints.chat_template import END_TOKEN, IMAGE_TOKEN, chat_template
from dynamic_llava.data.conversation import Turn, render_conversation
from dynamic_llava.data.shapes.describe import describe
from dynamic_llava.data.shapes.questions import KINDS, NUMBERS, PLURALS, ask_many
from dynamic_llava.data.shapes.scene import COLOURS, PATCH_SIZE, PICTURE_SIZE, SHAPES, sample_split_scene
from tools.tiny_base.config import SYSTEM_PROMPT, TinyBaseConfig

_MAX_VOCABULARY = 1024
_CORPUS_SCENES = 2000
_OTHER_TEXT = (
    "Answer the question using a single word or phrase. What is in the picture? Describe this image. "
    "Compare the two pictures. Look at the image and tell me what you see. Yes No"
)


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the text of the shapes: their words are single tokens, any other text works too."""
    rng = np.random.default_rng(seed)
    words = " ".join((*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS, "yes no"))
    corpus = [f"{_OTHER_TEXT} {words}"] * 4
    for _ in range(_CORPUS_SCENES):
        scene = sample_split_scene(rng, "train")
        request, answer = describe(scene, rng)
        turns = [Turn("user", request), Turn("assistant", answer)]
        for question in ask_many(scene, len(KINDS), rng):
            turns += [Turn("user", question.text), Turn("assistant", question.answer)]
        corpus.append(render_conversation(turns, SYSTEM_PROMPT)[0].replace(END_TOKEN, " "))
    special = ["<unk>", "<s>", END_TOKEN, "<pad>", IMAGE_TOKEN]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=END_TOKEN,
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=chat_template(SYSTEM_PROMPT),
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Returns the LLaVA processor: Pillow image processing (no torchvision) at the size of the shapes."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=chat_template(SYSTEM_PROMPT),
        num_additional_image_tokens=1,
    )


def build_model(config: TinyBaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Returns the untrained model in the layout of LLaVA-1.5, seeded by the config."""
    torch.manual_seed(config.seed)
    vision = CLIPVisionConfig(
        image_size=PICTURE_SIZE, patch_size=PATCH_SIZE, projection_dim=config.vision.hidden_size, **vars(config.vision)
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        num_key_value_heads=config.text.num_attention_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        **vars(config.text),
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(PICTURE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _start_from_lookup(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


@torch.no_grad()
def _start_from_lookup(model: LlavaForConditionalGeneration) -> None:
    """Starts attention as a lookup of like by like: `Wq' Wk` and `Wo Wv` close to multiples of the identity.

    The mimetic initialisation of Trockman & Kolter (2023). With random matrices a decoder of this size needs more
    steps to find out that "red" should look for red patches than all the training here has.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for head in attention.q_proj.weight.split(attention.head_dim):
            nn.init.orthogonal_(head)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.7)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
