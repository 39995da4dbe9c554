"""The Triton kernels of block-sparse convolution: an implicit product over pixels, images channels innermost.

A stored block lies inside one tap, so that it meets a run of channels of one shifted image: (dh, dw, channel block),
read a step ahead as scalars. The gradient of the images is the same kernel, shifted the other way, one phase of the
stride at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bsr.kernels import finish, item_and_tile, load_block, multiply, split_and_start, whose_turn, write


@triton.jit
def pixel(p, height, width):
    """(image, row, column) of the p-th pixel of images [.., height, width]."""
    row = p // width
    return row // height, row % height, p % width


@triton.jit
def shifted(x, image, i, j, dh, dw, height, width, channels, channel, inside, channels_end, EVEN: tl.constexpr):
    """The channels of pixels (image, i + dh, j + dw); zero outside of the images."""
    h, w = i + dh, j + dw
    seen = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    at = ((image * height + h) * width + w).to(tl.int64) * channels
    mask = seen[:, None]
    if not EVEN:
        mask = mask & (channel < channels_end)[None, :]
    return tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["count", "token_tiles", "pixels"])
def bsr_conv(
    x, w, y, partial, bias, scale, items, shifts, gather,
    pixels, grid_h, grid_w, height, width, channels, size, stride_h, stride_w,
    y_h, y_w, first_h, first_w, step_h, step_w, count, token_tiles,
    OUT: tl.constexpr, IN: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(sum over blocks of x[shifted pixels, channels] w_block + bias) over a list of work (bsr/work.py).

    Pixels (image, i, j) of a grid [.., grid_h, grid_w] read x [.., height, width, channels] from (i stride_h + dh,
    j stride_w + dw) on, and are (first_h + i step_h, first_w + j step_w) of y [.., y_h, y_w, size].
    """
    STEPS: tl.constexpr = IN // DEPTH
    total = count * token_tiles
    for turn in range(0, tl.cdiv(total, tl.num_programs(0))):
        tile = whose_turn(turn, total)
        if tile < total:
            item, t = item_and_tile(tile, count, token_tiles, GROUP)
            row = tl.load(items + item * 4)
            if row >= 0:
                begin = tl.load(items + item * 4 + 1)
                end = tl.load(items + item * 4 + 2)
                p = t * TOKENS + tl.arange(0, TOKENS)
                inside = p < pixels
                image, i, j = pixel(p, grid_h, grid_w)
                k = tl.arange(0, DEPTH)
                acc = tl.zeros((TOKENS, OUT), tl.float32)
                some = begin < end
                dh = tl.load(shifts + begin * 3, mask=some, other=0)
                dw = tl.load(shifts + begin * 3 + 1, mask=some, other=0)
                place = tl.load(shifts + begin * 3 + 2, mask=some, other=0)
                block = begin
                if gather is not None:
                    block = tl.load(gather + begin, mask=some, other=0)
                for step in range(begin * STEPS, end * STEPS):
                    part = step % STEPS * DEPTH
                    a = shifted(
                        x, image, i * stride_h, j * stride_w, dh, dw, height, width, channels, place * IN + part + k,
                        inside, channels, EVEN,
                    )  # fmt: skip
                    b = load_block(
                        w, scale, block, place, part, OUT, IN, DEPTH, TRANSPOSED, False, False, channels, TYPE
                    )
                    acc = multiply(a, b, acc, PRECISION, tl.float32, False)
                    ahead = tl.minimum((step + 1) // STEPS, end - 1)
                    dh = tl.load(shifts + ahead * 3)
                    dw = tl.load(shifts + ahead * 3 + 1)
                    place = tl.load(shifts + ahead * 3 + 2)
                    block = ahead
                    if gather is not None:
                        block = tl.load(gather + ahead)
                slot = tl.load(items + item * 4 + 3)
                if SPLIT and slot >= 0:
                    here = (slot * token_tiles + t).to(tl.int64) * (TOKENS * OUT)
                    within = tl.arange(0, TOKENS)[:, None] * OUT + tl.arange(0, OUT)[None, :]
                    tl.store(partial + here + within, acc)
                else:
                    v = finish(acc, row, p, inside, size, bias, scale, None, False, OUT, ACTIVATION)
                    at = (image * y_h + first_h + i * step_h) * y_w + first_w + j * step_w
                    write(v, y, None, 0, at.to(tl.int64), row, size, size, 0, inside, TOKENS, OUT)


@triton.jit(do_not_specialize=["token_tiles", "pixels"])
def bsr_conv_join(
    partial, y, bias, splits, pixels, grid_h, grid_w, size, y_h, y_w, first_h, first_w, step_h, step_w, token_tiles,
    OUT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The rows that were cut: their partial sums, in order, then the same ending. A program has ROWS of the TOKENS."""
    split, start = split_and_start(pixels, ROWS)
    row = tl.load(splits + split * 3)
    first = tl.load(splits + split * 3 + 1)
    count = tl.load(splits + split * 3 + 2)
    p = start + tl.arange(0, ROWS)
    within = (start % TOKENS + tl.arange(0, ROWS))[:, None] * OUT + tl.arange(0, OUT)[None, :]
    if row >= 0:
        acc = tl.zeros((ROWS, OUT), tl.float32)
        for i in range(0, count):
            here = ((first + i) * token_tiles + start // TOKENS).to(tl.int64) * (TOKENS * OUT)
            acc += tl.load(partial + here + within)
        v = finish(acc, row, p, p < pixels, size, bias, None, None, False, OUT, ACTIVATION)
        image, i, j = pixel(p, grid_h, grid_w)
        at = (image * y_h + first_h + i * step_h) * y_w + first_w + j * step_w
        write(v, y, None, 0, at.to(tl.int64), row, size, size, 0, p < pixels, ROWS, OUT)


@triton.jit(do_not_specialize=["share", "blocks", "pixels"])
def bsr_conv_sddmm(
    dy, x, out, row, shifts, pixels, grid_h, grid_w, height, width, channels, size, stride_h, stride_w, share, blocks,
    R: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, block] = the sum over `share` pixels of dy^T x[shifted pixels, channels], at each stored block."""
    block = tl.program_id(0)
    begin = tl.program_id(1) * share
    o = tl.load(row + block) * R + tl.arange(0, R)
    dh = tl.load(shifts + block * 3)
    dw = tl.load(shifts + block * 3 + 1)
    channel = tl.load(shifts + block * 3 + 2) * C + tl.arange(0, C)
    acc = tl.zeros((R, C), tl.float32)
    for start in range(begin, tl.minimum(begin + share, pixels), TOKENS):
        p = start + tl.arange(0, TOKENS)
        inside = p < pixels
        image, i, j = pixel(p, grid_h, grid_w)
        mask = inside[None, :]
        if not EVEN:
            mask = mask & (o < size)[:, None]
        a = tl.load(dy + p.to(tl.int64)[None, :] * size + o[:, None], mask=mask, other=0.0)
        b = shifted(
            x, image, i * stride_h, j * stride_w, dh, dw, height, width, channels, channel, inside, channels, True
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    here = (tl.program_id(1).to(tl.int64) * blocks + block) * (R * C)
    within = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + here + within, acc.to(out.dtype.element_ty))
