// Fragment orders of a bitmap weight: what a lane needs, in the order in which it needs it
// (sparsekern/bitmap/fragments.py).
//
// W is cut into tiles, contiguous along K, each a record of as many bytes as its nonzeros need. A tile has steps s of
// 1024 weights, in which a lane owns 32: those of four A operands i of 16 x 16 (mma.m16n8k16; a warp's part of
// wgmma.m64nNk16). With g = lane / 4 and t = lane % 4, bit 16 h + 8 e + 2 i + r of its word is element e of register
// 2 h + r of operand i: the weight in row 8 r + g, column 8 h + 2 t + e of it. There are two orders of operands:
//
//   sm80   64 rows x 32 columns; steps of 16 columns, whose four operands lie below each other: one warp's work
//   sm90   64 rows x 64 columns; steps of 16 rows, whose four operands lie beside each other: a warp's of a warpgroup
//
// and a record holds
//   starts  sm90: where the values of each step begin, four 16-bit numbers of bytes, and 8 bytes of zeros;
//   bits    32 words for each step, lane by lane (128 bytes);
//   values  step by step, the eight groups of four bits (i, h) of a step one after the other; in a group lane by lane,
//           in a lane registers r, then elements e; filled up to a multiple of 16 bytes.
//
// Decoding must keep up with the memory, which brings 1024 weights of half density in 77 cycles of an H100's
// multiprocessor, in 54 of an H200's. So it is counted in each of the units that it needs:
// - Shared memory, one access of a warp a cycle: two for each pair of weights (32), whose addresses are apart by a
//   constant: the first value and the one after it, which the pair may or may not have. Groups of four bits keep the
//   lanes' values so close that few of them share a bank. The lanes' places are a prefix sum over 32 lanes of 8
//   counters: 2 exchanges while they are nibbles, 6 when they are bytes.
// - Integer logic, two instructions of a warp a cycle: a pair becomes a register by one byte permutation, whose
// selector
//   is linear in the two bits, so it is a dot product of them and two constants. Addresses are dot products of counters
//   and weights, which pick a byte, scale it and add. These run beside the logic, at the same rate.
// On Hopper nvcc makes of 1024 weights (all of a warp's loop) 42 accesses, 76 instructions of logic, 68 of
// multiplication and 208 in all, four of which are issued a cycle: 52 cycles (tests/test_codegen.py).
#pragma once
#include "../device/copy.h"

namespace sk::bitmap {

using device::Type;

constexpr int kUnit = 16;  // offsets count so many bytes
constexpr int kStepBitBytes = 128;

struct Sm80Order {
    static constexpr int kRows = 64, kColumns = 32, kSteps = 2, kBits = 0, kValues = kSteps * kStepBitBytes;
};
struct Sm90Order {
    static constexpr int kRows = 64, kColumns = 64, kSteps = 4, kBits = 16, kValues = kBits + kSteps * kStepBitBytes;
};
constexpr int kSlack = 16;  // bytes behind the last record that a pair without a second value may touch

// Where a lane's values of a step lie: the counts of its groups before it, and of all lanes. Group (i, h) is byte
// 2 h + i % 2 of word i / 2.
struct Places {
    uint32_t before[2], all[2];
};

// A lane's numbers 0 and 1 that say, for each distance of the sum over lanes, whether it comes second.
struct Turns {
    uint32_t second[5];
    SK_DEVICE explicit Turns(uint32_t lane) {
        SK_UNROLL
        for (int i = 0; i < 5; ++i) second[i] = lane >> i & 1;
    }
};

SK_DEVICE Places places(uint32_t bits, const Turns& turns) {
    using device::shuffle_xor;
    constexpr uint32_t kLow = 0x0F0F0F0Fu;
    // The counts of the eight groups as nibbles: bits of both registers, then of both elements (neighbouring bytes).
    const uint32_t x = bits - (bits >> 1 & 0x55555555u);
    const uint32_t even = (x & 0x33333333u) * 0x0101u, odd = (x >> 2 & 0x33333333u) * 0x0101u;  // in bytes 1 and 3
    const uint32_t own = device::permute_bytes(even, odd, 0x7351);
    // The four lanes of a row: at most 12 before a lane, but 16 in all of them.
    uint32_t other = shuffle_xor(own, 1), before = other * turns.second[0];
    const uint32_t two = own + other;
    other = shuffle_xor(two, 2);
    before += other * turns.second[1];
    Places out{{before & kLow, before >> 4 & kLow},
               {(two & kLow) + (other & kLow), (two >> 4 & kLow) + (other >> 4 & kLow)}};
    SK_UNROLL
    for (int i = 2; i < 5; ++i) {
        SK_UNROLL
        for (int w = 0; w < 2; ++w) {
            other = shuffle_xor(out.all[w], 1u << i);
            out.before[w] += other * turns.second[i];
            out.all[w] += other;
        }
    }
    return out;
}

// Operand i of a step: `at` is the shared address of the values of its first group, and moves on to the next operand's.
SK_DEVICE void decode(uint32_t (&a)[4], uint32_t bits, const Places& places, int i, uint32_t& at) {
    using namespace device;
    // The register of a pair of bits from its two values (bytes 0, 1 and 4, 5; the others are zero) by permute_bytes:
    //   none 0x3232, the first alone 0x7610, the second alone 0x1032 (its value came first), both 0x5410;
    // what is above place 15 does not count.
    constexpr uint32_t kFirst = 0x43DE, kSecond = 0xDE00;
    const uint32_t pairs[2] = {bits >> (2 * i) & 0x01010101u, bits >> (2 * i + 1) & 0x01010101u};  // r; bytes 2 h + e
    const auto take = [&]<bool kHigh>(int r, uint32_t from) {
        const uint32_t selector = dot_halves<kHigh>(kSecond << 16 | kFirst, pairs[r], 0x3232);
        return permute_bytes(load_shared_half<0>(from), load_shared_half<2>(from), selector);
    };
    const auto group = [&]<bool kHigh>() {
        constexpr int h = kHigh;
        const uint32_t pick = 2u << (8 * (2 * h + i % 2));  // twice the group's byte: values have two bytes
        const uint32_t first = dot_bytes(places.before[i / 2], pick, at);
        a[2 * h] = take.template operator()<kHigh>(0, first);
        a[2 * h + 1] = take.template operator()<kHigh>(1, dot_bytes(pairs[0], 0x0202u << (16 * h), first));
        at = dot_bytes(places.all[i / 2], pick, at);
    };
    group.template operator()<false>();
    group.template operator()<true>();
}

}  // namespace sk::bitmap
