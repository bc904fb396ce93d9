"""What the paper reports of its generation benchmarks beside perplexity (Table 3), of reference answers and samples.

"Total -> computing" tokens, decode TFLOPs without and KV megabytes with a cache are those of the reference answers, so
that models that write answers of different length are compared on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints.loaded import LoadedModel
from ..efficiency.flops import kv_cache_bytes, paper_flops
from .meteor import corpus_meteor
from .perplexity import AnswerScores, SampleScore

TERA, MEGA = 1e12, 1e6


def table_3(loaded: LoadedModel, scores: AnswerScores) -> dict[str, float]:
    """Means over the samples.

    Returns:
        `output_tokens` and `output_tokens_kept` (by the sparse layers); `decode_tflops_no_cache`: of the output tokens
        in the last step without a cache, by the paper's formula; `kv_megabytes`: keys and values of the output tokens
        in the model's type.
    """
    samples = scores.samples
    return {
        "output_tokens": scores.mean("output_tokens"),
        "output_tokens_kept": scores.mean("output_tokens_kept"),
        "decode_tflops_no_cache": sum(_decode_flops(loaded, s) for s in samples) / len(samples) / TERA,
        "kv_megabytes": sum(_kv_bytes(loaded, s) for s in samples) / len(samples) / MEGA,
    }


def _decode_flops(loaded: LoadedModel, sample: SampleScore) -> int:
    text, sparsity = loaded.model.config.text_config, getattr(loaded.model.config, "sparsity", None)
    dense_layers = text.num_hidden_layers if sparsity is None else sparsity.sparse_layer
    tokens = (sample.output_tokens, sample.output_tokens_kept)
    return paper_flops(text.hidden_size, text.num_hidden_layers, *tokens, dense_layers)


def _kv_bytes(loaded: LoadedModel, sample: SampleScore) -> int:
    dtype_bytes = loaded.model.dtype.itemsize
    return kv_cache_bytes(loaded.model.config, sample.output_tokens, sample.output_tokens_kept, dtype_bytes)


def corpus_metrics(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`meteor_1_5` over all answers of a task's lmms-eval samples; nothing where it cannot be computed."""
    predictions: list[str] = []
    references: list[str] = []
    for sample in samples:
        answers, told = sample["filtered_resps"][0], sample["doc"]["answers"]
        predictions += answers if isinstance(answers, list) else [answers]
        references += told
    score = corpus_meteor(predictions, references)
    return {} if score is None else {"meteor_1_5": score}
