"""A decode step does little beside what the stock decoder does: no masks, no copies, few operations more."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_llava import SparseCache

from .tiny import batch_of, image_run, pictures, stock_model, tiny_model, words

# Operations without a kernel.
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze", "select", "unbind", "alias"),
    *("permute", "detach", "as_strided", "split", "empty", "_reshape_alias", "lift_fresh"),
}
READS = {"_local_scalar_dense", "nonzero"}


class Operations(TorchDispatchMode):
    """Counts the operations that run a kernel, and those that read a value back to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.kernels += name not in VIEWS | READS
        self.reads += name in READS
        return func(*args, **(kwargs or {}))


class StepCounts:
    """Operations of each call of a model and of what `generate` does around it, without those of the predictor."""

    def __init__(self, model, without: nn.Module | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self.mode, self.skipped = Operations(), 0
        if without is not None:
            without.register_forward_pre_hook(lambda *_: setattr(self, "before", self.mode.kernels))
            without.register_forward_hook(
                lambda *_: setattr(self, "skipped", self.skipped + self.mode.kernels - self.before)
            )
        model.lm_head.register_forward_hook(
            lambda *_: self.steps.append((self.mode.kernels - self.skipped, self.mode.reads))
        )

    def last_step(self) -> tuple[int, int]:
        """From head to head of the last two calls."""
        return tuple(b - a for a, b in zip(*self.steps[-2:], strict=True))


GREEDY = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def counted(model, batch, without=None, **arguments) -> StepCounts:
    counts = StepCounts(model, without)
    with torch.no_grad(), counts.mode:
        model.generate(**batch, **GREEDY, **arguments)
    return counts


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("arguments", [{}, {"output_sparsity": False}])
def test_a_step_runs_few_operations_more_than_stock(rows, arguments):
    model = tiny_model()
    prompt = [[1, *image_run(), *words(5, 1)]] * rows
    batch = batch_of(prompt, [pictures(1)] * rows, "left")
    stock = counted(stock_model(model), batch)
    ours = counted(model, batch, without=model.model.language_model.output_predictor, **arguments)
    kernels, reads = (one - two for one, two in zip(ours.last_step(), stock.last_step(), strict=True))
    # Cursor, slots, what was decided; with several rows the one mask of the step.
    assert kernels <= (11 if rows == 1 else 17)
    # The cursor: of one row behind the stop of `generate`, of several where reading is free.
    assert reads <= 1


@pytest.mark.parametrize("hidden", [0, 2, 20, -3])
def test_a_second_generate_that_hides_a_column_differs_from_one_that_does_not(hidden):
    """One row: what the mask of `generate` hides of earlier turns stays hidden in its steps, and only there."""
    model = tiny_model()
    first = batch_of([[1, *words(3, 4), *image_run(), *words(4, 2)]], [pictures(1)], "left")

    def talk(mask_of_second, steps):
        cache = SparseCache(model.config)
        begun = model.generate(**first, **GREEDY, past_key_values=cache)
        whole = torch.cat([begun, torch.tensor([words(6, 8)])], dim=1)
        mask = torch.ones_like(whole)
        if mask_of_second:
            mask[0, hidden - (6 if hidden < 0 else 0)] = 0
        if steps:
            return model.generate(
                whole,
                attention_mask=mask,
                past_key_values=cache,
                return_dict_in_generate=True,
                output_logits=True,
                **GREEDY,
            )
        logits, fed = [], whole[:, cache.get_seq_length() :]
        for _ in range(9):
            positions = (mask.cumsum(-1) - 1)[:, -fed.shape[1] :]
            told = {"num_generated": int(bool(logits))}
            with torch.no_grad():
                out = model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache, **told)
            logits.append(out.logits[:, -1])
            fed = out.logits[:, -1:].index_fill(-1, torch.tensor([2, 99]), float("-inf")).argmax(-1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return torch.stack(logits, dim=1)

    masked = torch.stack(talk(True, True).logits, dim=1)
    torch.testing.assert_close(masked, talk(True, False), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(talk(False, True).logits, dim=1), talk(False, False), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masked, talk(False, False), atol=1e-3)


def test_a_step_by_hand_reads_nothing_that_a_mask_would_tell():
    """Without `generate` a mask may hide anything: what it hides is hidden, whatever earlier calls were shown."""
    model = tiny_model()
    batch = batch_of([[1, *image_run(), *words(6, 3)]], [pictures(1)], "left")
    logits = []
    with torch.no_grad():
        for hidden in (None, 19):
            cache = model(**batch, use_cache=True).past_key_values
            mask = torch.ones(1, batch["input_ids"].shape[1] + 1, dtype=torch.long)
            if hidden is not None:
                mask[0, hidden] = 0
            logits.append(model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache).logits)
    assert not torch.allclose(*logits, atol=1e-4)
