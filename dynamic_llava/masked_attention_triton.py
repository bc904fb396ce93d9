"""MaskedSoftmax attention as Triton kernels: one pass over tiles in each direction, nothing of size N x N.

The same sums as `masked_attention_blocked`, whose formulas these follow: forward keeps the log-sum-exp of each row,
backward makes each tile's weights again (flash attention, arXiv 2205.14135) and adds the gradient of the gates. A
column's gradients and its gate are one program's sums over the queries behind it, so that nothing is added atomically
and two runs give the same bits.

Importing this module needs `triton`, which CUDA builds of torch bring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masked_softmax import check_estimator, column_states

# In a `try` of its own: what transformers reads of a checkpoint's code would else ask every machine for it.
try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels of MaskedSoftmax need the package triton: pip install triton.") from error


@triton.jit
def _tile(base, batch, head, positions, stride_b, stride_h, stride_n, length, HEAD: tl.constexpr):
    """Rows `positions` of one head, `(len(positions), HEAD)`, zeros beyond the sequence."""
    start = base + batch * stride_b + head * stride_h
    places = start + positions[:, None].to(tl.int64) * stride_n + tl.arange(0, HEAD)[None, :]
    return tl.load(places, mask=positions[:, None] < length, other=0.0)


@triton.jit
def _store(base, tile, batch, head, positions, stride_b, stride_h, stride_n, length, HEAD: tl.constexpr):
    """The inverse of `_tile`."""
    start = base + batch * stride_b + head * stride_h
    places = start + positions[:, None].to(tl.int64) * stride_n + tl.arange(0, HEAD)[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), mask=positions[:, None] < length)


@triton.jit
def _forward(
    query, key, value, kept, output, lse, scaling, length, heads, groups,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ROWS queries of one head, by the online softmax."""
    # The last queries see most: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = _tile(query, batch, head, rows, q_b, q_h, q_n, length, HEAD)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(0, tl.minimum((block + 1) * ROWS, length), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        k = _tile(key, batch, head // groups, columns, k_b, k_h, k_n, length, HEAD)
        stays = tl.load(kept + batch * length + columns, mask=columns < length, other=0) != 0
        visible = ((columns[None, :] < rows[:, None]) & stays[None, :]) | (columns[None, :] == rows[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # Nothing seen yet: any finite reference leaves the weights at 0.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - reference[:, None])
        shrink = tl.exp(top - reference)
        total = total * shrink + tl.sum(weights, 1)
        v = _tile(value, batch, head // groups, columns, v_b, v_h, v_n, length, HEAD)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    _store(output, summed / total[:, None], batch, head, rows, o_b, o_h, o_n, length, HEAD)
    tl.store(lse + (batch * heads + head) * length + rows, top + tl.log(total), mask=rows < length)


@triton.jit
def _backward_columns(
    query, key, value, kept, present, lse, delta, grad, grad_key, grad_value, grad_gate, scaling, length, heads, groups,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    GATES: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Gradients of COLUMNS keys and values of one head of keys, and what their gates get from it."""
    kv_heads = heads // groups
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    start = tl.program_id(0) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    inside = columns < length
    k = _tile(key, batch, kv_head, columns, k_b, k_h, k_n, length, HEAD)
    v = _tile(value, batch, kv_head, columns, v_b, v_h, v_n, length, HEAD)
    stays = tl.load(kept + batch * length + columns, mask=inside, other=0) != 0
    state = tl.load(present + batch * length + columns, mask=inside, other=0)
    is_present = state != 0
    sum_key = tl.zeros([COLUMNS, HEAD], tl.float32)
    sum_value = tl.zeros([COLUMNS, HEAD], tl.float32)
    sum_gate = tl.zeros([COLUMNS], tl.float32)
    for member in range(0, groups):
        head = kv_head * groups + member
        for first in range((start // ROWS) * ROWS, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            q = _tile(query, batch, head, rows, q_b, q_h, q_n, length, HEAD)
            g = _tile(grad, batch, head, rows, g_b, g_h, g_n, length, HEAD)
            at = (batch * heads + head) * length + rows
            # Beyond the sequence an infinite lse makes every weight 0.
            total = tl.load(lse + at, mask=rows < length, other=float("inf"))
            mean = tl.load(delta + at, mask=rows < length, other=0.0)
            before = columns[:, None] < rows[None, :]
            visible = (before & stays[:, None]) | (columns[:, None] == rows[None, :])
            shifted = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling - total[None, :]
            weights = tl.where(visible, tl.exp(shifted), 0.0)
            sum_value += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
            gap = tl.dot(v, tl.trans(g), input_precision=PRECISION) - mean[None, :]
            sum_key += tl.dot((weights * gap * scaling).to(q.dtype), q, input_precision=PRECISION)
            if GATES:
                own = tl.exp(shifted)
                if BOUNDED:
                    unbounded = stays | (state > 1)
                    own = tl.where(unbounded[:, None], own, 1.0 / (1.0 + tl.exp(-shifted)))
                judged = before & is_present[:, None] & (rows[None, :] < length)
                sum_gate += tl.sum(tl.where(judged, own * gap, 0.0), 1)
    _store(grad_key, sum_key, batch, kv_head, columns, dk_b, dk_h, dk_n, length, HEAD)
    _store(grad_value, sum_value, batch, kv_head, columns, dv_b, dv_h, dv_n, length, HEAD)
    if GATES:
        tl.store(grad_gate + (batch * kv_heads + kv_head) * length + columns, sum_gate, mask=inside)


@triton.jit
def _backward_rows(
    query, key, value, kept, lse, delta, grad, grad_query, scaling, length, heads, groups,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n,
    HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ROWS queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = _tile(query, batch, head, rows, q_b, q_h, q_n, length, HEAD)
    g = _tile(grad, batch, head, rows, g_b, g_h, g_n, length, HEAD)
    at = (batch * heads + head) * length + rows
    total = tl.load(lse + at, mask=rows < length, other=float("inf"))
    mean = tl.load(delta + at, mask=rows < length, other=0.0)
    summed = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(0, tl.minimum((block + 1) * ROWS, length), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        k = _tile(key, batch, head // groups, columns, k_b, k_h, k_n, length, HEAD)
        v = _tile(value, batch, head // groups, columns, v_b, v_h, v_n, length, HEAD)
        stays = tl.load(kept + batch * length + columns, mask=columns < length, other=0) != 0
        visible = ((columns[None, :] < rows[:, None]) & stays[None, :]) | (columns[None, :] == rows[:, None])
        shifted = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling - total[:, None]
        weights = tl.where(visible, tl.exp(shifted), 0.0)
        gap = tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None]
        summed += tl.dot((weights * gap * scaling).to(k.dtype), k, input_precision=PRECISION)
    _store(grad_query, summed, batch, head, rows, dq_b, dq_h, dq_n, length, HEAD)


def tile_options(dtype: torch.dtype, head_size: int) -> dict[str, object]:
    """Constants of the kernels: tiles that fit the shared memory of every GPU from compute capability 8.0 on."""
    # float32 keeps its precision: no tensor cores, and tiles of half the side.
    side = 32 if dtype == torch.float32 else 64
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {"HEAD": head_size, "ROWS": side, "COLUMNS": side, "PRECISION": precision}


def launch_options(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Warps and pipeline stages of a launch."""
    return {"num_warps": 8 if head_size == 128 else 4, "num_stages": 2}


def triton_masked_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    present: Tensor,
    scaling: float,
    estimator: str | Tensor = "bounded",
) -> Tensor:
    """As `blocked_masked_softmax`, for what `masked_attention_kernels.unsupported` lets through.

    Weights enter the products with the values in the type of `value`, as in flash attention; sums are float32.
    """
    check_estimator(estimator)
    return _Fused.apply(query, key, value, keep_mask, present, scaling, estimator)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, keep_mask, present, scaling, estimator):
        query, key, value = (_rows_together(tensor) for tensor in (query, key, value))
        kept = (present & (keep_mask > 0.5)).to(torch.int8).contiguous()
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        tiles = tile_options(query.dtype, query.shape[-1])
        sizes = _sizes(query, key)
        _forward[_grid(query, tiles["ROWS"])](
            query, key, value, kept, output, lse, scaling, *sizes, *_strides(query, key, value, output),
            **tiles, **launch_options(query.dtype, query.shape[-1]),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, kept, present, output, lse)
        ctx.scaling, ctx.estimator, ctx.gate_dtype = scaling, estimator, keep_mask.dtype
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, kept, present, output, lse = ctx.saved_tensors
        grad = _rows_together(grad.to(query.dtype))
        delta = (grad.float() * output.float()).sum(-1)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        gates, bounded = ctx.needs_input_grad[3], isinstance(ctx.estimator, Tensor) or ctx.estimator == "bounded"
        gate = lse.new_zeros(key.shape[:3]) if gates else lse
        tiles, launch = (make(query.dtype, query.shape[-1]) for make in (tile_options, launch_options))
        sizes, inputs = _sizes(query, key), (query, key, value)
        _backward_columns[_grid(key, tiles["COLUMNS"])](
            *inputs, kept, column_states(present, ctx.estimator), lse, delta, grad, *grads[1:], gate, ctx.scaling,
            *sizes, *_strides(*inputs, grad, *grads[1:]), GATES=gates, BOUNDED=bounded, **tiles, **launch,
        )  # fmt: skip
        _backward_rows[_grid(query, tiles["ROWS"])](
            *inputs, kept, lse, delta, grad, grads[0], ctx.scaling, *sizes, *_strides(*inputs, grad, grads[0]),
            **tiles, **launch,
        )  # fmt: skip
        return *grads, gate.sum(1).to(ctx.gate_dtype) if gates else None, None, None, None


def _rows_together(tensor: Tensor) -> Tensor:
    """`tensor` with the numbers of a token's head side by side, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Length, heads, heads per head of keys."""
    return query.shape[2], query.shape[1], query.shape[1] // key.shape[1]


def _grid(tensor: Tensor, side: int) -> tuple[int, int]:
    return triton.cdiv(tensor.shape[2], side), tensor.shape[0] * tensor.shape[1]
