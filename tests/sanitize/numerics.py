"""Every entry of a sanitized _host at odd sizes: run by tests/test_sanitize.py under ASan and UBSan.

Usage: numerics.py PATH_OF_THE_SANITIZED_MODULE. All tensors are exactly as large as they must be, so that the
sanitizer's red zones begin with the first byte outside. Ends with an error if an entry was never called.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

CALLED: set[str] = set()
SHAPES = (
    (1, 1, 1),
    (1, 33, 70),
    (3, 17, 21),
    (5, 16, 64),
    (19, 37, 130),
    (66, 35, 67),
    (2, 5, 0),
    (0, 5, 9),
    (4, 0, 8),
)


def load(path: str) -> ModuleType:
    """The module as sparsekern._host, with every entry noting that it was called."""
    spec = importlib.util.spec_from_file_location("sparsekern._host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in entries(module):
        setattr(module, name, noting(name, getattr(module, name)))
    sys.modules["sparsekern._host"] = module
    return module


def entries(module: ModuleType) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]


def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(name)
        return function(*args, **kwargs)

    return call


def main() -> None:
    module = load(sys.argv[1])
    import torch

    from sparsekern import testing

    torch.set_num_threads(2)
    isas = [name for name in module.built_isas() if name in module.supported_isas()]
    for isa in isas:
        with testing.host_isa(isa):
            for format, block in (
                ("sp24", 1),
                ("bsr", (3, 5)),
                ("bsr", (16, 16)),
                ("bsr", (32, 32)),
                ("csr", 1),
                ("bitmap", 1),
            ):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    for m, n, k in SHAPES:
                        products(format, block, dtype, m, n, k)
                if format in ("sp24", "bsr"):
                    for m, n, k in SHAPES:
                        quantised(format, block, m, n, k)
            large()
            convolutions()
    assert module.active_isa() in isas
    never = set(entries(module)) - CALLED
    if never:
        raise SystemExit(f"entries of _host that no test calls: {sorted(never)}")
    print(f"{len(CALLED)} entries of _host on {', '.join(isas)}: clean")


def products(format: str, block: Any, dtype: Any, m: int, n: int, k: int) -> None:
    """Packing, unpacking and the three products, checked against float64."""
    import torch

    from sparsekern import dispatch, testing

    dense = testing.random_weight(format, n, k, dtype, 0.4, block, seed=m)
    layout = testing.pack(format, dense, block).check()
    assert torch.equal(layout.unpack(), dense)
    assert torch.equal(layout.to_dense(), dense)
    x, dy = testing.random_dense(m, k, dtype=dtype, seed=1), testing.random_dense(m, n, dtype=dtype, seed=2)
    bias = testing.random_dense(n, dtype=dtype, seed=3)
    if dispatch.why_not("host", "mm", layout, x) is None:
        host = dispatch.choose("mm", layout, x, "host")
        for rows in (x, x.t().contiguous().t()):
            for activation in ("none", "gelu", "none"):  # a weight used again may be walked in another order
                y = host.mm(layout, rows, bias, activation)
                testing.assert_close(y, testing.reference_mm(dense, x, bias, activation), dtype, tol=2e-2)
    if dispatch.why_not("host", "mm_t", layout, dy) is None:
        dx = dispatch.choose("mm_t", layout, dy, "host").mm_t(layout, dy)
        testing.assert_close(dx, testing.reference_mm_t(dense, dy), dtype, tol=2e-2)
    if dispatch.why_not("host", "sddmm", layout, x) is None:
        gradient = dispatch.choose("sddmm", layout, x, "host").sddmm(layout, dy, x)
        right = layout.sample(testing.reference_sddmm(dy, x))
        testing.assert_close(gradient, right, dtype, tol=2e-2)


def quantised(format: str, block: Any, m: int, n: int, k: int) -> None:
    import torch

    from sparsekern import dispatch, testing

    dense, scale = testing.random_weight(format, n, k, torch.int8, 0.4, block), testing.random_scale(n)
    layout = testing.pack(format, dense, block, scale).check()
    wide = dense.double() * scale.double()[:, None]
    for dtype in (torch.int8, torch.float32, torch.bfloat16, torch.float16):
        x = testing.random_dense(m, k, dtype=dtype, seed=1)
        if dispatch.why_not("host", "mm", layout, x) is None:
            y = dispatch.choose("mm", layout, x, "host").mm(layout, x, testing.random_dense(n, seed=3), "relu")
            right = testing.reference_mm(wide, x, testing.random_dense(n, seed=3), "relu")
            testing.assert_close(y, right, tol=2e-2)
        if dtype != torch.int8 and dispatch.why_not("host", "mm_t", layout, x) is None:
            dy = testing.random_dense(m, n, dtype=dtype, seed=2)
            dx = dispatch.choose("mm_t", layout, dy, "host").mm_t(layout, dy)
            testing.assert_close(dx, testing.reference_mm_t(wide, dy), tol=2e-2)


def large() -> None:
    """Enough work to be shared between threads, pruning while packing, and what only benches call."""
    import torch

    from sparsekern import testing
    from sparsekern.sp24 import pack

    for format in ("sp24", "bsr", "csr", "bitmap"):
        for dtype in (torch.float32, torch.bfloat16):
            products(format, 32, dtype, 33, 515, 390)
            products(format, 32, dtype, 129, 130, 390)
    packed = pack(testing.random_dense(37, 61), prune=True).check()
    assert packed.unpack().count_nonzero() > 37 * 28
    module = sys.modules["sparsekern._host"]
    assert module.sp24_check(packed.metadata.data_ptr(), packed.metadata.numel()) == -1
    for m, n, k in ((1, 5, 33), (3, 17, 96), (2, 8, 130)):
        x, w = testing.random_dense(m, k, dtype=torch.bfloat16), testing.random_dense(n, k, dtype=torch.bfloat16)
        y = x.new_empty(m, n)
        module.dense_gemv_bf16(x.data_ptr(), w.data_ptr(), y.data_ptr(), m, n, k, 2)
        testing.assert_close(y, testing.reference_mm(w, x), tol=2e-2)


def convolutions() -> None:
    """Forward and backward of SparseConv2d in every format, odd images, strides and groups."""
    import torch
    from torch import nn

    from sparsekern import testing
    from sparsekern.nn import SparseConv2d

    for format in ("csr", "bitmap", "bsr", "sp24"):
        for options in ({"padding": 1}, {"stride": 2, "padding": 2, "dilation": 2}, {"groups": 2}):
            groups = options.get("groups", 1)
            conv = nn.Conv2d(8, 12, 3, **options)  # type: ignore[arg-type]
            weight = testing.random_weight("sp24", 12, 72 // groups)
            conv.weight = nn.Parameter(weight.view(12, 8 // groups, 3, 3))
            sparse = SparseConv2d.from_dense(conv, format=format, **({"block_size": 4} if format == "bsr" else {}))
            for memory in (torch.contiguous_format, torch.channels_last):
                x = testing.random_dense(2, 8, 11, 9, seed=1).contiguous(memory_format=memory).requires_grad_()
                y = sparse(x)
                right = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), **options)  # type: ignore
                testing.assert_close(y, right, tol=1e-5)
                y.sum().backward()


if __name__ == "__main__":
    main()
