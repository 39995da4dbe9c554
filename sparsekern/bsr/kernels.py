"""The Triton kernels of bsr: X W^T, dY W and the sampled dY^T X, for every block and type; no autotuning.

Tokens lie on the M side of every product with activations, so that a block of 16 rows fills a 64-row tensor-core
instruction. The place of the next block is read one step ahead as a scalar: no load of the loop hangs on another one.
What is compiled is spelt out in constexpr arguments (config.py chooses them), so the interpreter runs the same text.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The activations of ref.ACTIVATIONS in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0.0, 0.0, v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 1.5957691216057308 * (v + 0.044715 * v * v * v)  # tanh(u) = 1 - 2 / (exp(2 u) + 1)
        v = 0.5 * v * (2.0 - 2.0 / (tl.exp(inner) + 1.0))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    return v


@triton.jit
def finish(
    acc, row, at, inside, size, bias, scale, x_scale, SCALED: tl.constexpr, OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """act(scale * x_scale[at] * acc + bias) in float32; bias and the scales are None where there is none."""
    o = row * OUT + tl.arange(0, OUT)
    v = acc.to(tl.float32)
    if SCALED:
        v = v * tl.load(scale + o, mask=o < size, other=0.0)[None, :]
    if x_scale is not None:
        v = v * tl.load(x_scale + at, mask=inside, other=0.0)[:, None]
    if bias is not None:
        v = v + tl.load(bias + o, mask=o < size, other=0.0).to(tl.float32)[None, :]
    return activate(v, ACTIVATION)


@triton.jit
def write(
    v, y, residual, start, at, row, size, y_stride, residual_stride, inside, ROWS: tl.constexpr, OUT: tl.constexpr
):
    """y[start + at, columns of this row] = v (+ residual), where `inside` and within the matrix.

    What all share is 64 bits wide and a scalar; offsets in a tile (`at` times a stride) are as wide as `at`. A
    large tile goes in two halves, or sums, residuals and their addresses do not fit in the registers.
    """
    large: tl.constexpr = 16384 if residual is None else 8192
    if large <= ROWS * OUT:
        half: tl.constexpr = OUT // 2
        left, right = tl.split(tl.permute(tl.reshape(v, (ROWS, 2, half)), (0, 2, 1)))
        write_columns(left, y, residual, start, at, row * OUT, size, y_stride, residual_stride, inside, half)
        write_columns(right, y, residual, start, at, row * OUT + half, size, y_stride, residual_stride, inside, half)
    else:
        write_columns(v, y, residual, start, at, row * OUT, size, y_stride, residual_stride, inside, OUT)


@triton.jit
def write_columns(v, y, residual, start, at, column, size, y_stride, residual_stride, inside, OUT: tl.constexpr):
    """`write` of columns [column, column + OUT)."""
    o = column + tl.arange(0, OUT)
    mask = inside[:, None] & (o < size)[None, :]
    if residual is not None:
        there = residual + tl.cast(start, tl.int64) * residual_stride
        v = v + tl.load(there + (at[:, None] * residual_stride + o[None, :]), mask=mask, other=0.0).to(tl.float32)
    here = y + tl.cast(start, tl.int64) * y_stride
    tl.store(here + (at[:, None] * y_stride + o[None, :]), v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def load_block(
    w, scale, block, inner, part,
    OUT: tl.constexpr, IN: tl.constexpr, DEPTH: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
    TMA: tl.constexpr, inner_size, TYPE: tl.constexpr,
):  # fmt: skip
    """DEPTH of a block's inner side, from `part` on, as [DEPTH, OUT] in the activations' type."""
    o, i = tl.arange(0, OUT), tl.arange(0, DEPTH)
    if TRANSPOSED:  # stored [IN, OUT]
        if TMA:
            b = w.load([block * IN + part, 0])
        else:
            b = tl.load(w + block.to(tl.int64) * (IN * OUT) + (part + i)[:, None] * OUT + o[None, :])
        if SCALED:
            k = inner * IN + part + i
            b = b.to(tl.float32) * tl.load(scale + k, mask=k < inner_size, other=0.0)[:, None]
        return b.to(TYPE)
    else:  # stored [OUT, IN]
        if TMA:
            b = w.load([block * OUT, part])
        else:
            b = tl.load(w + block.to(tl.int64) * (OUT * IN) + o[:, None] * IN + (part + i)[None, :])
        return tl.trans(b.to(TYPE))


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, ACC: tl.constexpr, FP8: tl.constexpr):
    """acc + a b. fp8 sums leave the tensor core's short accumulator after every step."""
    if FP8:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1], out_dtype=ACC)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def whose_turn(turn, total):
    """The tile of a persistent program in its turn: there and back over the programs, since items get shorter."""
    programs = tl.num_programs(0)
    place = tl.program_id(0)
    return turn * programs + tl.where(turn % 2 == 0, place, programs - 1 - place)


@triton.jit
def item_and_tile(tile, items, token_tiles, GROUP: tl.constexpr):
    """Which item and which tile of tokens: all items for GROUP tiles of tokens, whose activations stay in L2."""
    per_group = items * GROUP
    group = tile // per_group
    rest = tile % per_group
    width = tl.minimum(token_tiles - group * GROUP, GROUP)
    return rest // width, group * GROUP + rest % width


@triton.jit(do_not_specialize=["count", "token_tiles"])
def bsr_mm(
    x, w, y, partial, bias, scale, x_scale, residual, items, inner, gather,
    m, size, inner_size, x_stride, y_stride, residual_stride, count, token_tiles,
    OUT: tl.constexpr, IN: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(x_scale * x W^T scale + bias) + residual, or y = x W where TRANSPOSED, over a list of work (work.py).

    x [m, inner_size] and the blocks of w come through pointers, or through TMA descriptors of [TOKENS, DEPTH] and of a
    [DEPTH, OUT] (TRANSPOSED) or [OUT, DEPTH] part. EVEN: inner_size is a multiple of IN.
    """
    STEPS: tl.constexpr = IN // DEPTH
    SCALED: tl.constexpr = scale is not None
    total = count * token_tiles
    for turn in range(0, tl.cdiv(total, tl.num_programs(0))):
        tile = whose_turn(turn, total)
        if tile < total:
            item, t = item_and_tile(tile, count, token_tiles, GROUP)
            row = tl.load(items + item * 4)
            if row >= 0:
                begin = tl.load(items + item * 4 + 1)
                end = tl.load(items + item * 4 + 2)
                tokens = t * TOKENS + tl.arange(0, TOKENS)
                # Rows beyond the last one compute what nobody stores; reading row m - 1 instead needs no mask.
                at = tl.minimum(tokens, m - 1).to(tl.int64)
                k = tl.arange(0, DEPTH)
                acc = tl.zeros((TOKENS, OUT), ACC)
                place = tl.load(inner + begin, mask=begin < end, other=0)
                block = begin
                if gather is not None:
                    block = tl.load(gather + begin, mask=begin < end, other=0)
                for step in range(begin * STEPS, end * STEPS):
                    part = step % STEPS * DEPTH
                    k0 = place * IN + part
                    if TMA:
                        a = x.load([t * TOKENS, k0])
                    elif EVEN:
                        a = tl.load(x + at[:, None] * x_stride + (k0 + k)[None, :])
                    else:
                        inside = (k0 + k)[None, :] < inner_size
                        a = tl.load(x + at[:, None] * x_stride + (k0 + k)[None, :], mask=inside, other=0.0)
                    b = load_block(
                        w, scale, block, place, part, OUT, IN, DEPTH, TRANSPOSED, SCALED and TRANSPOSED, TMA,
                        inner_size, TYPE,
                    )  # fmt: skip
                    acc = multiply(a, b, acc, PRECISION, ACC, FP8)
                    ahead = tl.minimum((step + 1) // STEPS, end - 1)
                    place = tl.load(inner + ahead)
                    block = ahead
                    if gather is not None:
                        block = tl.load(gather + ahead)
                slot = tl.load(items + item * 4 + 3)
                if SPLIT and slot >= 0:
                    here = (slot * token_tiles + t).to(tl.int64) * (TOKENS * OUT)
                    within = tl.arange(0, TOKENS)[:, None] * OUT + tl.arange(0, OUT)[None, :]
                    tl.store(partial + here + within, acc)
                else:
                    v = finish(
                        acc, row, tokens, tokens < m, size, bias, scale, x_scale, SCALED and not TRANSPOSED, OUT,
                        ACTIVATION,
                    )  # fmt: skip
                    write(
                        v, y, residual, t * TOKENS, tl.arange(0, TOKENS), row, size, y_stride, residual_stride,
                        tokens < m, TOKENS, OUT,
                    )  # fmt: skip


@triton.jit
def split_and_start(tokens, ROWS: tl.constexpr):
    """Which cut row and which tokens a program of a second pass has: one axis, since the others end at 65535."""
    chunks = tl.cdiv(tokens, ROWS)
    return tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS


@triton.jit(do_not_specialize=["token_tiles"])
def bsr_mm_join(
    partial, y, bias, scale, x_scale, residual, splits, m, size, y_stride, residual_stride, token_tiles,
    OUT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The rows that were cut: their partial sums, in order, then the same ending. A program has ROWS of the TOKENS."""
    split, start = split_and_start(m, ROWS)
    row = tl.load(splits + split * 3)
    first = tl.load(splits + split * 3 + 1)
    count = tl.load(splits + split * 3 + 2)
    tokens = start + tl.arange(0, ROWS)
    within = (start % TOKENS + tl.arange(0, ROWS))[:, None] * OUT + tl.arange(0, OUT)[None, :]
    if row >= 0:
        acc = tl.zeros((ROWS, OUT), partial.dtype.element_ty)
        for i in range(0, count):
            here = ((first + i) * token_tiles + start // TOKENS).to(tl.int64) * (TOKENS * OUT)
            acc += tl.load(partial + here + within)
        v = finish(acc, row, tokens, tokens < m, size, bias, scale, x_scale, SCALED, OUT, ACTIVATION)
        write(v, y, residual, start, tl.arange(0, ROWS), row, size, y_stride, residual_stride, tokens < m, ROWS, OUT)


@triton.jit(do_not_specialize=["share", "blocks"])
def bsr_sddmm(
    dy, x, out, row, col, m, n, k, dy_stride, x_stride, share, blocks,
    R: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, block] = the sum of dy^T x over `share` tokens, at each stored block. EVEN: whole blocks, no edges."""
    block = tl.program_id(0)
    first = tl.program_id(1) * share
    r = tl.load(row + block) * R
    c = tl.load(col + block) * C
    acc = tl.zeros((R, C), tl.float32)
    ri, ci = r + tl.arange(0, R), c + tl.arange(0, C)
    for t in range(first, tl.minimum(first + share, m), TOKENS):
        tokens = t + tl.arange(0, TOKENS)
        if TMA:
            a = tl.trans(dy.load([t, r]))
            b = x.load([t, c])
        else:  # dy is read as it is multiplied: turned round after it was read, it would wait in registers
            at = tokens.to(tl.int64)
            inside = tokens < m
            if EVEN:
                a = tl.load(dy + at[None, :] * dy_stride + ri[:, None], mask=inside[None, :], other=0.0)
                b = tl.load(x + at[:, None] * x_stride + ci[None, :], mask=inside[:, None], other=0.0)
            else:
                a = tl.load(
                    dy + at[None, :] * dy_stride + ri[:, None], mask=inside[None, :] & (ri < n)[:, None], other=0.0
                )
                b = tl.load(
                    x + at[:, None] * x_stride + ci[None, :], mask=inside[:, None] & (ci < k)[None, :], other=0.0
                )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    here = (tl.program_id(1).to(tl.int64) * blocks + block) * (R * C)
    within = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + here + within, acc.to(out.dtype.element_ty))


@triton.jit
def add_parts(parts, out, size, count, WIDTH: tl.constexpr):
    """out = the sum over the first dimension of parts [count, size], in order."""
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), tl.float32)
    for _ in range(0, count):
        acc += tl.load(parts + i, mask=i < size, other=0.0)
        parts += size
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)
