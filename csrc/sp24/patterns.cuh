// The 4 x 4 patterns that are 2:4 along rows and along columns, and the tile in which they are sought.
#pragma once
#include "fragments.cuh"

namespace sk::sp24::forms {

// The 64 x 64 tile of 16-bit elements in shared memory. 33 words a row: columns are read without bank conflicts.
constexpr int kPitch = 33;
constexpr int kTileBytes = kBlockRows * kPitch * 4;
constexpr int kSharedBytes = kTileBytes + 256 * 2;  // and the patterns of its 4 x 4 tiles

SK_DEVICE void store_tile(uint32_t* tile, const uint32_t (&d)[4], int row, int chunk) {
    SK_UNROLL
    for (int i = 0; i < 4; ++i) tile[row * kPitch + chunk * 4 + i] = d[i];
}

// |w| as it is summed: beyond 2^120, infinities and NaN count as 2^120.
SK_DEVICE float weight_of(Type type, uint32_t bits) {
    constexpr float kMost = 1.329227995784916e36f;
    bits &= 0x7FFF;
    const float size = type == Type::bf16 ? device::bf16_to_float(static_cast<uint16_t>(bits))
                                          : device::f16_to_float(static_cast<uint16_t>(bits));
    return size < kMost ? size : kMost;
}

// The best of the 90 patterns of a 4 x 4 tile with two entries in every row and column, by the sum of what they keep:
// four nibbles, row 0 first. sparsekern/sp24/pack.py has the same order of sums and of ties.
//
// Pairs of columns 01 02 03 12 13 23 are numbered 0..5, so 5 - p is the complement of p. Rows 0 and 1 have pairs p, q;
// what they leave to rows 2 and 3 depends on their column counts alone: the complement twice where p = q, any two
// complements where q = 5 - p, else 5 - p and 5 - q in either order.
SK_DEVICE uint32_t best_pattern(const float (&w)[4][4]) {
    float sum[4][6];
    SK_UNROLL
    for (int r = 0; r < 4; ++r) {
        SK_UNROLL
        for (int a = 0, p = 0; a < 3; ++a) {
            SK_UNROLL
            for (int b = a + 1; b < 4; ++b, ++p) sum[r][p] = w[r][a] + w[r][b];
        }
    }
    float best = -1.0f;
    uint32_t pairs = 0;  // a byte a row
    const auto consider = [&](float total, uint32_t four) {
        if (total > best) best = total, pairs = four;
    };
    SK_UNROLL
    for (uint32_t p = 0; p < 6; ++p) {
        consider((sum[0][p] + sum[1][p]) + (sum[2][5 - p] + sum[3][5 - p]), p * 0x101 + (5 - p) * 0x1010000);
    }
    float top = -1.0f, bottom = -1.0f;
    uint32_t top_pairs = 0, bottom_pairs = 0;
    SK_UNROLL
    for (uint32_t p = 0; p < 6; ++p) {
        const float above = sum[0][p] + sum[1][5 - p], below = sum[2][p] + sum[3][5 - p];
        if (above > top) top = above, top_pairs = p | (5 - p) << 8;
        if (below > bottom) bottom = below, bottom_pairs = p << 16 | (5 - p) << 24;
    }
    consider(top + bottom, top_pairs | bottom_pairs);
    SK_UNROLL
    for (uint32_t p = 0; p < 5; ++p) {
        SK_UNROLL
        for (uint32_t q = p + 1; q < 6; ++q) {
            if (q == 5 - p) continue;
            const float above = sum[0][p] + sum[1][q], crossed = sum[0][q] + sum[1][p];
            const float below = sum[2][5 - p] + sum[3][5 - q], across = sum[2][5 - q] + sum[3][5 - p];
            consider((crossed > above ? crossed : above) + (across > below ? across : below),
                     (crossed > above ? q | p << 8 : p | q << 8) |
                         (across > below ? (5 - q) << 16 | (5 - p) << 24 : (5 - p) << 16 | (5 - q) << 24));
        }
    }
    uint32_t nibbles = 0;
    SK_UNROLL
    for (int r = 0; r < 4; ++r) nibbles |= (0xED9C84u >> 4 * (pairs >> 8 * r & 7) & 15) << 4 * r;
    return nibbles;
}

// The patterns of the tile's 256 little tiles, two for each thread.
SK_DEVICE void find_patterns(const uint32_t* tile, uint16_t* patterns, Type type, uint32_t thread) {
    SK_NO_UNROLL
    for (uint32_t i = thread; i < 256; i += 128) {
        float w[4][4];
        SK_UNROLL
        for (int r = 0; r < 4; ++r) {
            const uint32_t* at = tile + (i / 16 * 4 + r) * kPitch + i % 16 * 2;
            SK_UNROLL
            for (int e = 0; e < 4; ++e) w[r][e] = weight_of(type, at[e / 2] >> e % 2 * 16 & 0xFFFF);
        }
        patterns[i] = static_cast<uint16_t>(best_pattern(w));
    }
}

}  // namespace sk::sp24::forms
