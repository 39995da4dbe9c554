// Fragment order of a bitmap weight: what a lane needs, in the order in which it needs it
// (sparsekern/bitmap/fragments.py).
//
// W is cut into tiles of 64 rows x 32 columns, contiguous along K, each a record of as many bytes as its nonzeros need.
// A tile has two steps s of 16 columns; in a step, with g = lane / 4 and t = lane % 4, lane l owns 32 weights: those of
// its A operands of mma.m16n8k16 for four tiles i of 16 rows. Bit 8 i + 4 h + 2 r + e of its word is the weight in row
// 16 i + 8 r + g, column 16 s + 8 h + 2 t + e: element e of register 2 h + r. A record holds
//   bits    32 words for each step, lane by lane (256 bytes);
//   values  step by step, the eight groups of four bits (i, h) of a step one after the other; in a group lane by lane,
//           in a lane in the order of its bits; filled up to a multiple of 16 bytes.
//
// Groups of four are what makes decoding cheap: the counts of a word's eight groups are eight nibbles of one SWAR sum,
// and their prefix over the lanes is two scans of four bytes each (at most 4 * 32 = 128). That is 12 exchanges for 1024
// weights where one popcount for every pair would be 16 a lane, at 16 popcounts a cycle and SM 32 cycles: the time in
// which an H100's memory brings 1024 weights. Within a group the lanes' values are neighbours in shared memory.
#pragma once
#include "../device/copy.h"

namespace sk::bitmap {

using device::Type;

constexpr int kTileRows = 64, kTileColumns = 32, kSteps = 2, kBitBytes = 256, kUnit = 16;  // offsets count kUnit bytes

// Where a lane's values of a step lie: the counts of its groups before it, and of all lanes. Group 2 b + o is byte b of
// word o.
struct Places {
    uint32_t before[2], all[2];
};

SK_DEVICE Places places(uint32_t bits, uint32_t lane) {
    uint32_t x = bits - (bits >> 1 & 0x55555555u);
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    Places out;
    SK_UNROLL
    for (int o = 0; o < 2; ++o) {
        const uint32_t own = x >> (4 * o) & 0x0F0F0F0Fu;
        uint32_t sum = own;
        SK_UNROLL
        for (uint32_t d = 1; d < 32; d *= 2) {
            const uint32_t lower = device::shuffle(sum, lane - d);
            if (lane >= d) sum += lower;
        }
        out.before[o] = sum - own;
        out.all[o] = device::shuffle(sum, 31);
    }
    return out;
}

// The A operand of row tile i: `at` points to the step's values of group 2 i, and moves on to the next tile's.
SK_DEVICE void decode(uint32_t (&a)[4], uint32_t bits, const Places& places, int i, const uint16_t*& at) {
    SK_UNROLL
    for (int h = 0; h < 2; ++h) {
        const uint16_t* from = at + (places.before[h] >> (8 * i) & 0xFF);
        uint32_t v[4];
        SK_UNROLL
        for (int j = 0; j < 4; ++j) {
            const bool on = bits >> (8 * i + 4 * h + j) & 1;
            v[j] = 0;
            if (on) v[j] = *from;
            from += on;
        }
        a[2 * h] = v[0] | v[1] << 16;
        a[2 * h + 1] = v[2] | v[3] << 16;
        at += places.all[h] >> (8 * i) & 0xFF;
    }
}

}  // namespace sk::bitmap
