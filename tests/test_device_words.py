"""The words of csrc/device that move and count rather than multiply: each alone, under every schedule."""

from __future__ import annotations

from types import ModuleType

import torch

from sparsekern.testing import random_dense


def test_words(probed: ModuleType) -> None:
    """Loads past the cache and of shared memory, byte permutations, dot products of bytes and halves."""
    value = random_dense(32, seed=3).view(torch.int32)
    other, out = value.flip(0), torch.zeros(10, 32, dtype=torch.int32)
    probed.probe_words(value.data_ptr(), out.data_ptr())
    assert torch.equal(out[0], value)
    quads = value.view(8, 4)
    twos = (value[::2] - value[1::2]).repeat(2)
    assert torch.equal(out[1], (quads[:, 0] ^ quads[:, 1] ^ quads[:, 2] ^ quads[:, 3]).repeat(4) ^ twos)
    assert torch.equal(out[9], twos)
    a, b = (t.contiguous().view(torch.uint8).view(32, 4).long() for t in (value, other))
    eight = torch.cat((a, b), 1)
    assert torch.equal(out[2].view(torch.uint8).view(32, 4).long(), eight[:, [0, 5, 2, 7]])
    selector = value.long() & 0x7777
    chosen = torch.stack([eight.gather(1, (selector >> 4 * i & 7)[:, None])[:, 0] for i in range(4)], 1)
    assert torch.equal(out[3].view(torch.uint8).view(32, 4).long(), chosen)
    assert torch.equal(out[4].long(), 1000 + (a * b).sum(1))
    halves = value.view(torch.int16).view(32, 2).long() & 0xFFFF
    assert torch.equal(out[5].long() & 0xFFFFFFFF, 1000 + (halves * b[:, :2]).sum(1))
    assert torch.equal(out[6].long() & 0xFFFFFFFF, 1000 + (halves * b[:, 2:]).sum(1))
    assert torch.equal(out[7], other)
    assert torch.equal(out[8], value)


def test_groups_of_copies(probed: ModuleType) -> None:
    given, out = torch.randint(1, 2**31 - 1, (64,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    probed.probe_groups(given.data_ptr(), out.data_ptr())
    assert torch.equal(out, given)


def test_named_barriers(probed: ModuleType) -> None:
    """Two pairs of warps meet at two barriers, several times."""
    given, out = torch.arange(128, dtype=torch.int32) * 7, torch.zeros(3, 128, dtype=torch.int32)
    probed.probe_named(given.data_ptr(), out.data_ptr())
    for i, row in enumerate(out):
        assert torch.equal(row, given[torch.arange(128) ^ 32] + i)


def test_rings(probed: ModuleType) -> None:
    """Boxes and bulk copies through a ring whose stages both blocks of a cluster must leave: many phases."""
    rounds = 7
    matrix = random_dense(16 * rounds, 64, seed=1).to(torch.bfloat16)
    given = torch.randint(0, 256, (2 * rounds, 64), dtype=torch.uint8)
    out = torch.zeros(2, rounds, 1024 + 64, dtype=torch.uint8)
    probed.probe_ring(matrix.data_ptr(), given.data_ptr(), rounds, out.data_ptr())
    chunks = matrix.view(torch.uint8).view(rounds, 2, 8, 8, 16)  # round, block, row, chunk
    row = torch.arange(8)
    for block in range(2):
        assert torch.equal(out[block, :, 1024:], given.view(rounds, 2, 64)[:, block])
        got = out[block, :, :1024].view(rounds, 8, 8, 16)
        for chunk in range(8):  # 16-byte chunk c of row r lies at c ^ r
            assert torch.equal(got[:, row, chunk ^ row], chunks[:, block, :, chunk])


def test_counts_between_blocks(probed: ModuleType) -> None:
    numbers = torch.randint(5, 2**62, (40,), dtype=torch.int64)
    counter, order = torch.zeros(1, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    smallest = torch.full((1,), 2**62, dtype=torch.int64)
    probed.probe_counts(40, *(t.data_ptr() for t in (numbers, counter, order, smallest)))
    assert int(counter) == 40
    assert torch.equal(order.sort().values, torch.arange(40, dtype=torch.int32))
    assert torch.equal(smallest[0], numbers.min())
