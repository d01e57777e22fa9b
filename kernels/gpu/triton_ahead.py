"""Compile the Triton kernel ahead of time, without a GPU, for TensorRT plans."""

from __future__ import annotations

import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.interpreter import InterpretedFunction

from kernels.engine import EngineError
from kernels.gpu.triton_encoder import OPTIONS, TritonEncoder, encode_rows

#: The types of the pointers that do not point to float32.
_KINDS = {
    "tiles": "*i32",
    **dict.fromkeys(("exponentials", "values", "tokens"), "*bf16"),
    **dict.fromkeys(("hidden1", "out1", "query_key2", "value_out2", "hidden2", "out2"), "*bf16"),
}
_ENTRY = re.compile(r"(\.entry\s+\w+\()(.*?)(\n\))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A compiled kernel, to launch with one program per tile.

    Attributes:
        name: entry point.
        ptx: takes one pointer for each of `arguments()`.
        cubin: the assembled PTX.
        threads: threads of a program.
        shared_bytes: dynamic shared memory of a program.
    """

    name: str
    ptx: str
    cubin: bytes
    threads: int
    shared_bytes: int


def arguments() -> tuple[str, ...]:
    """Return the names of the kernel's pointer arguments, the output last."""
    names = encode_rows.arg_names
    return tuple(names[: names.index("encoded") + 1])


def compiled(encoder: TritonEncoder, architecture: str) -> CompiledKernel:
    """Compile the kernel for an encoder and a compute capability such as `9.0`.

    Raises:
        EngineError: Triton cannot compile it, or only interprets kernels (TRITON_INTERPRET=1).
    """
    if isinstance(encode_rows, InterpretedFunction):
        raise EngineError("Triton cannot compile in interpreter mode; unset TRITON_INTERPRET")
    constants, names = encoder.constants, encode_rows.arg_names
    signature = {name: "constexpr" if name in constants else _KINDS.get(name, "*fp32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in arguments()}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(encode_rows, signature, fixed, aligned)
    target = GPUTarget("cuda", int(architecture.replace(".", "")), 32)
    try:
        made = triton.compile(source, target=target, options={"num_warps": encoder.warps, **OPTIONS})
    except (RuntimeError, TritonError) as error:
        raise EngineError(f"Triton cannot compile the encoder for {architecture}: {error}") from error
    ptx = _only_arguments(made.asm["ptx"], len(arguments()))
    return CompiledKernel(
        made.metadata.name, ptx, made.asm["cubin"], made.metadata.num_warps * 32, made.metadata.shared
    )


def _only_arguments(ptx: str, count: int) -> str:
    """Remove the parameters that Triton adds for scratch memory, which TensorRT does not pass.

    Raises:
        EngineError: the kernel reads one of them.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise EngineError("the PTX from Triton has no entry point")
    parameters = entry[2].split(",")
    for added in parameters[count:]:
        name = added.split()[-1]
        if re.search(rf"\b{name}\b", ptx[entry.end() :]):
            raise EngineError(f"the kernel reads {name}, Triton's scratch memory, which TensorRT does not provide")
    return ptx[: entry.start(2)] + ",".join(parameters[:count]) + ptx[entry.end(2) :]
