"""Compile the Triton kernels for GPUs without having one: `python tests/compile_kernels.py`, one line per kernel.

Exits with an error where a kernel does not compile, needs more shared memory than a block may have, or does its 16-bit
products without tensor cores.
"""

from __future__ import annotations

import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynamic_llava import masked_attention_triton as triton_attention

# Bytes of shared memory per block (CUDA programming guide); 8.6 has the least of those from 8.0 on.
SHARED_MEMORY = {86: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {
    triton_attention._forward: {},
    triton_attention._backward_columns: {"GATES": True, "BOUNDED": True},
    triton_attention._backward_rows: {},
}


def signature(kernel, constants: dict, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments as a training step passes them."""
    types = {"kept": "*i8", "present": "*i8", "scaling": "fp32"}
    types |= dict.fromkeys(("lse", "delta", "grad_gate"), "*fp32")
    tensors = ("query", "key", "value", "output", "grad", "grad_query", "grad_key", "grad_value")
    types |= dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    return {name: types.get(name, "i32") for name in kernel.arg_names}


def compile_kernel(kernel, extra: dict, dtype: torch.dtype, head_size: int, capability: int) -> str:
    """One line on the compiled kernel."""
    constants = {**triton_attention.tile_options(dtype, head_size), **extra}
    types = signature(kernel, constants, TYPES[dtype])
    # Strides and pointers are multiples of 16 in a model.
    aligned = [n for n, kind in types.items() if kind.startswith("*") or re.fullmatch(r"[a-z]+_[bhn]", n)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    launch = triton_attention.launch_options(dtype, head_size)
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    shared, tensor_cores = compiled.metadata.shared, bool(re.search(r"mma\.sync|wgmma", compiled.asm["ptx"]))
    line = f"{capability} {dtype} {head_size} {kernel.__name__}: {shared} bytes, tensor cores {tensor_cores}"
    if shared > SHARED_MEMORY[capability] or tensor_cores != (dtype != torch.float32) or not compiled.asm["cubin"]:
        raise SystemExit(f"not as it should be: {line}")
    return line


if __name__ == "__main__":
    for capability, head_size in ((86, 64), (90, 128)):
        for dtype in TYPES:
            for kernel, extra in KERNELS.items():
                print(compile_kernel(kernel, extra, dtype, head_size, capability))
