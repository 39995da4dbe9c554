"""Compiles the Triton kernels for cards that are not there; run as a program, prints one JSON row a kernel.

    python tests/codegen.py CC quick     what the tests look at
    python tests/codegen.py CC all       every block, type, way of loading and number of tokens: minutes

In a process of its own: where TRITON_INTERPRET is set, kernels are not the compiler's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern.bsr import kernels
from sparsekern.bsr import triton as launcher
from sparsekern.bsr.config import Config, beside_a_residual, config, sides
from sparsekern.conv import kernels as convolution

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call as a launcher would make it: its kernel is compiled with the heuristic's configuration."""

    op: str
    m: int
    block: tuple[int, int]
    dtype: torch.dtype
    weight: torch.dtype
    precision: str = "tf32x3"
    tma: bool | None = None
    even: bool = True
    full: bool = False  # every word of an ending: bias, both scales, residual, float32 out

    def __str__(self) -> str:
        kind = NAMES[self.dtype] + ("" if self.weight == self.dtype else f"*{NAMES[self.weight]}")
        kind += f"-{self.precision}" if self.dtype == torch.float32 else ""
        maps = "" if self.tma is None else "-maps" if self.tma else "-pointers"
        return (
            f"{self.op}-m{self.m}-{self.block[0]}x{self.block[1]}-{kind}{maps}{'' if self.even else '-odd'}"
            + "-full" * self.full
        )


def cases(kind: str) -> Iterator[Case]:
    half, fp32, i8, fp8 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    yield Case("mm", 4096, (128, 128), half, half)
    yield Case("mm", 4096, (64, 64), half, half, tma=False)
    yield Case("mm", 8, (64, 64), half, half)
    yield Case("mm_t", 4096, (128, 128), half, half)
    yield Case("sddmm", 4096, (128, 128), half, half)
    yield Case("mm", 4096, (16, 16), half, half)
    yield Case("mm", 4096, (64, 64), fp32, fp32)
    yield Case("mm", 4096, (64, 64), i8, i8)
    yield Case("mm", 4096, (64, 64), half, i8)
    yield Case("mm", 4096, (64, 64), fp8, fp8)
    yield Case("mm", 4096, (64, 64), fp32, fp32, "ieee")
    yield Case("mm_t", 33, (32, 64), torch.float16, torch.float16, even=False)
    for op in ("conv2d", "conv2d_input", "conv2d_weight"):
        yield Case(op, 25088, (64, 64), half, half, tma=False)
        yield Case(op, 25088, (128, 128), fp32, fp32)
    for op in ("mm", "mm_t", "sddmm"):
        yield Case(op, 4096, (128, 128), fp32, fp32)
    yield Case("mm", 4096, (64, 64), half, half, full=True)
    yield Case("mm", 4096, (128, 128), half, half, full=True)
    yield Case("mm", 4096, (64, 64), i8, i8, full=True)
    for dtype in (half, i8):
        yield Case("mm_join", 4096, (64, 64), dtype, dtype, full=True)
    for op in ("conv2d_join", "add_parts"):
        yield Case(op, 25088, (64, 64), half, half)
    if kind == "quick":
        return
    blocks = [(r, c) for r in (16, 32, 64, 128) for c in (16, 32, 64, 128)]
    for block in blocks:
        for m in (1, 32, 64, 256, 4096):
            for op in ("mm", "mm_t", "sddmm"):
                for tma in (None, False):
                    yield Case(op, m, block, half, half, tma=tma)
                for precision in ("ieee", "tf32", "tf32x3"):
                    yield Case(op, m, block, fp32, fp32, precision)
                    yield Case(f"conv2d{CONVOLVED[op]}", m, block, fp32, fp32, precision)
                yield Case(op, m, block, torch.float16, torch.float16, even=False)
            if block[1] >= 32:
                for full in (False, True):
                    yield Case("mm", m, block, i8, i8, full=full)
                    yield Case("mm", m, block, fp8, fp8, full=full)
            for dtype in (half, fp32):
                yield Case("mm", m, block, dtype, dtype, full=True)
            for op in ("mm", "mm_t"):
                for dtype in (half, fp32):
                    yield Case(op, m, block, dtype, i8)
                yield Case(op, m, block, half, fp8)


CONVOLVED = {"mm": "", "mm_t": "_input", "sddmm": "_weight"}
PRODUCT = {f"conv2d{name}": op for op, name in CONVOLVED.items()} | {"mm_join": "mm", "conv2d_join": "mm"}


def chosen(case: Case, cc: int) -> Config:
    """The launcher's configuration; second passes have theirs of four warps."""
    if case.op == "add_parts":
        return Config(tokens=1024, depth=1, warps=4, stages=1)
    op = PRODUCT.get(case.op, case.op)
    made = config(op, case.m, 4096, 4096, case.block, case.dtype, 0.5, cc, precision=case.precision)
    made = beside_a_residual(made, sides(op, case.block)[0]) if case.full else made
    if case.op.endswith("join"):
        return replace(made, warps=4, stages=1, tma=False)
    maps = made.tma if case.tma is None else case.tma and cc >= 90
    return replace(made, tma=maps and case.weight == case.dtype and not case.op.startswith("conv"))


def ahead_bytes(case: Case, how: Config) -> int:
    """Of shared memory for the steps that are loaded ahead, all stages but the one that is multiplied."""
    if case.op.endswith("join") or case.op == "add_parts":
        return 0
    if PRODUCT.get(case.op, case.op) == "sddmm":
        stage = how.tokens * sum(case.block) * case.dtype.itemsize
    else:
        outer = sides(PRODUCT.get(case.op, case.op), case.block)[0]
        read = case.even or how.tma or case.dtype.itemsize >= 4  # else single 16-bit words, which no copy takes
        stage = how.depth * (how.tokens * case.dtype.itemsize * read + outer * case.weight.itemsize)
    return (how.stages - 1) * stage


_SEEN: set[Any] = set()


class Known(Exception):
    """Another case has the same kernel."""


def built(kernel: Any, arguments: dict[str, Any], how: Config, cc: int) -> Any:
    """The compiled kernel. Arguments are types ("*bf16", "i32", "tensordesc<...>") or, with "=", constants."""
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(arguments.items()):
        if isinstance(value, tuple):
            signature[name], constants[(place,)] = "constexpr", value[0]
            continue
        signature[name] = value
        uneven = name in ("size", "inner_size", "n", "k") and arguments.get("EVEN") == (False,)
        if value.startswith("*") or (name in DIVISIBLE and not uneven):
            attributes[(place,)] = [["tt.divisibility", 16]]
    key = (kernel.__name__, str(arguments), str(attributes), how.warps, how.stages, cc)
    if key in _SEEN:
        raise Known
    _SEEN.add(key)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": how.warps, "num_stages": how.stages}
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)


DIVISIBLE = ("size", "inner_size", "x_stride", "y_stride", "dy_stride", "n", "k", "channels")


def compile_case(case: Case, cc: int) -> tuple[Any, Config]:
    how, x, w = chosen(case, cc), NAMES[case.dtype], NAMES[case.weight]
    outer, inner = sides(PRODUCT.get(case.op, case.op), case.block)
    ints = case.dtype == torch.int8
    small = case.dtype.itemsize == 1
    if case.op == "add_parts":
        return _add_parts(how, x, cc), how

    def matrix(kind: str, rows: int, columns: int) -> str:
        return f"tensordesc<{kind}[{rows},{columns}]>" if how.tma else f"*{kind}"

    def integers(names: str) -> dict[str, Any]:
        return dict.fromkeys(names.split(), "i32")

    if case.op.startswith("conv2d"):
        return _convolution(case, how, cc), how
    if case.op == "sddmm":
        r, c = case.block
        arguments = {
            "dy": matrix(x, how.tokens, r), "x": matrix(x, how.tokens, c),
            "out": f"*{x}" if how.parts == 1 else "*fp32", "row": "*i32", "col": "*i32",
            **integers("m n k dy_stride x_stride share blocks"),
            "R": (r,), "C": (c,), "TOKENS": (how.tokens,), "EVEN": (case.even,), "TMA": (how.tma,),
            "PRECISION": (case.precision,),
        }  # fmt: skip
        return built(kernels.bsr_sddmm, arguments, how, cc), how
    columns = case.op == "mm_t"
    acc = torch.int32 if ints else torch.float32
    box = (how.depth, outer) if columns else (outer, how.depth)
    wide = "fp32" if small or case.full else x
    scales = {"scale": "*fp32" if case.weight.itemsize == 1 else (None,), "x_scale": "*fp32" if case.full else (None,)}
    residual = f"*{wide}" if case.full else (None,)
    if case.op == "mm_join":
        arguments = {
            "partial": f"*{NAMES[acc]}", "y": f"*{wide}", "bias": f"*{wide}", **scales, "residual": residual,
            "splits": "*i32", **integers("m size y_stride residual_stride token_tiles"), "OUT": (outer,),
            "TOKENS": (how.tokens,), "ROWS": (max(1, min(how.tokens, 4096 // outer)),),
            "SCALED": (case.weight.itemsize == 1,), "ACTIVATION": ("gelu",),
        }  # fmt: skip
        return built(kernels.bsr_mm_join, arguments, how, cc), how
    arguments = {
        "x": matrix(x, how.tokens, how.depth), "w": matrix(w, *box), "y": f"*{wide}", "partial": f"*{NAMES[acc]}",
        "bias": (None,) if columns else f"*{wide}", **scales, "residual": residual, "items": "*i32", "inner": "*i32",
        "gather": "*i32" if columns else (None,),
        **integers("m size inner_size x_stride y_stride residual_stride count token_tiles"),
        "OUT": (outer,), "IN": (inner,), "TOKENS": (how.tokens,), "DEPTH": (how.depth,), "TRANSPOSED": (columns,),
        "EVEN": (case.even,), "TMA": (how.tma,), "ACTIVATION": ("none" if columns else "gelu_tanh",),
        "PRECISION": (case.precision,), "TYPE": (launcher.triton_type(case.dtype),),
        "ACC": (launcher.triton_type(acc),), "FP8": (case.dtype == torch.float8_e4m3fn,), "SPLIT": (how.most > 0,),
        "GROUP": (how.group,),
    }  # fmt: skip
    return built(kernels.bsr_mm, arguments, how, cc), how


def _convolution(case: Case, how: Config, cc: int) -> Any:
    x, (r, c), columns = NAMES[case.dtype], case.block, case.op == "conv2d_input"
    ints = dict.fromkeys(
        ["pixels", "grid_h", "grid_w", "height", "width", "channels", "size", "stride_h", "stride_w"], "i32"
    )
    if case.op == "conv2d_weight":
        arguments = {
            "dy": f"*{x}", "x": f"*{x}", "out": f"*{x}", "row": "*i32", "shifts": "*i32", **ints, "share": "i32",
            "blocks": "i32", "R": (r,), "C": (c,), "TOKENS": (how.tokens,), "EVEN": (True,),
            "PRECISION": (case.precision,),
        }  # fmt: skip
        return built(convolution.bsr_conv_sddmm, arguments, how, cc)
    outer, inner = (c, r) if columns else (r, c)
    places = dict.fromkeys(["y_h", "y_w", "first_h", "first_w", "step_h", "step_w"], "i32")
    if case.op == "conv2d_join":
        arguments = {
            "partial": "*fp32", "y": f"*{x}", "bias": f"*{x}", "splits": "*i32",
            **dict.fromkeys(["pixels", "grid_h", "grid_w", "size"], "i32"), **places, "token_tiles": "i32",
            "OUT": (outer,), "TOKENS": (how.tokens,), "ROWS": (max(1, min(how.tokens, 4096 // outer)),),
            "ACTIVATION": ("gelu",),
        }  # fmt: skip
        return built(convolution.bsr_conv_join, arguments, how, cc)
    arguments = {
        "x": f"*{x}", "w": f"*{x}", "y": f"*{x}", "partial": "*fp32", "bias": (None,) if columns else f"*{x}",
        "scale": (None,), "items": "*i32", "shifts": "*i32", "gather": "*i32" if columns else (None,), **ints,
        **places, "count": "i32", "token_tiles": "i32",
        "OUT": (outer,), "IN": (inner,), "TOKENS": (how.tokens,), "DEPTH": (how.depth,), "TRANSPOSED": (columns,),
        "EVEN": (True,), "ACTIVATION": ("none" if columns else "relu",), "PRECISION": (case.precision,),
        "TYPE": (launcher.triton_type(case.dtype),), "SPLIT": (how.most > 0,), "GROUP": (how.group,),
    }  # fmt: skip
    return built(convolution.bsr_conv, arguments, how, cc)


def _add_parts(how: Config, kind: str, cc: int) -> Any:
    arguments = {"parts": "*fp32", "out": f"*{kind}", "size": "i32", "count": "i32", "WIDTH": (how.tokens,)}
    return built(kernels.add_parts, arguments, how, cc)


MATRIX = re.compile(r"wgmma\.mma_async\.sync\.aligned\.[\w.]+|tcgen05\.mma\.[\w:.]+|mma\.sync\.aligned\.[\w.]+")


def facts(made: Any) -> dict[str, Any]:
    """Registers and stack (where registers spill to) from the cubin, shared memory, matrix instructions of the PTX."""
    ptx = made.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as there:
        (Path(there) / "k.cubin").write_bytes(made.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", f"{there}/k.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", said)}
        spills = 0
        if used["STACK"] + used["LOCAL"]:  # a stack may be there for other reasons: count what is stored to it
            command = [str(tool), "--dump-sass", f"{there}/k.cubin"]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            spills = len(re.findall(r"\bSTL\b", sass))
    return {
        "spills": spills, "registers": used["REG"], "shared": made.metadata.shared,
        "matrix": sorted(set(MATRIX.findall(ptx))), "maps": "cp.async.bulk.tensor" in ptx,
    }  # fmt: skip


def main() -> None:
    cc, kind = int(sys.argv[1]), sys.argv[2]
    for case in cases(kind):
        if (case.dtype == torch.float8_e4m3fn and cc < 89) or (case.weight == torch.float8_e4m3fn and cc < 89):
            continue
        row: dict[str, Any] = {"case": str(case), "cc": cc}
        try:
            made, how = compile_case(case, cc)
            row |= facts(made) | {"how": str(how), "ahead": ahead_bytes(case, how)}
        except Known:
            continue
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
