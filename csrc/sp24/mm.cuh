// What every sp24 matrix product is told, and how its work is dealt out: Y[M, N] = epilogue(X[M, K] W[N, K]^T).
//
// X is a matrix, or the windows of images (device/images.h), of which there is no copy: a window is a token, and Y's
// rows are the pixels of the output, channels innermost. Only how a slice of X is brought to shared memory differs.
#pragma once
#include "../device/epilogue.h"
#include "../device/images.h"
#include "../device/parts.h"
#include "fragments.cuh"

namespace sk::sp24 {

struct Mm {
    const char* fragments;  // W in fragment order
    const char* x;
    char* y;
    int64_t x_stride, y_stride;  // elements from token to token
    int m, n, k;
    int row_blocks, k_blocks;  // of the fragments
    int x_align;               // 16, 8 or 4: bytes that divide every row's (pixel's) address and length
    // The first `streamed` tiles are cut along K so that every worker gets the same share of them; the others are dealt
    // out whole. A worker that has a part of a tile leaves its sums in `partials` (two slots a worker); the last to
    // arrive at the tile's counter adds the parts in their order, so the result does not depend on who is last.
    // Counters are zero before and after.
    int streamed;
    void* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
    device::Images images;  // x_stride is then from pixel to pixel
    device::Divisor channels, kernel_w;
};

// Tiles are numbered so that neighbours share rows or tokens: kGroup tiles of tokens, then the next rows.
struct Tile {
    int rows, tokens;
};

SK_DEVICE Tile tile_at(int i, int row_tiles, int token_tiles) {
    constexpr int kGroup = 8;
    const int first = i / (kGroup * row_tiles) * kGroup;
    const int width = token_tiles - first < kGroup ? token_tiles - first : kGroup;
    const int inside = i - first * row_tiles;
    return {inside / width, first + inside % width};
}

// The beginning of a token's window.
struct Window {
    int image, row, column;
};

SK_DEVICE Window window_at(const device::Images& g, int token) {
    const int size = g.out_h * g.out_w, image = token / size, inside = token - image * size, i = inside / g.out_w;
    return {image, i * g.stride_h - g.top, (inside - i * g.out_w) * g.stride_w - g.left};
}

// Where column k of X lies in its window: a tap, and a channel of that pixel.
struct Tap {
    int down, right, channel;
};

SK_DEVICE Tap tap_at(const Mm& p, uint32_t k) {
    const uint32_t tap = p.channels.divide(k), r = p.kernel_w.divide(tap);
    return {static_cast<int>(r) * p.images.dilation_h,
            static_cast<int>(tap - r * p.images.kernel_w) * p.images.dilation_w,
            static_cast<int>(k - tap * p.images.channels)};
}

using device::Piece;
using device::Pieces;

// Adds up the parts of a tile in the kThreads threads that hold one part's accumulators (one of kGroups such groups of
// the worker). Returns whether this was the last part to come, which then holds the sum. `flag` is a word of shared
// memory of the group, `barrier` its named barrier.
template <int kCount, int kThreads, int kCluster, int kGroups, class Acc>
SK_DEVICE bool add_parts(const Mm& p, const Piece& piece, int group, Acc* acc, uint32_t thread, uint32_t* flag,
                         uint32_t barrier) {
    if (piece.begin == 0 && piece.end == p.k_blocks) return true;
    const auto sharers = device::Sharers::of<kCluster>(p, piece);
    const auto slot = [&](int part) {
        const int64_t place = int64_t{sharers.slot(part)} * kGroups + group;
        return static_cast<Acc*>(p.partials) + place * kCount * kThreads + thread;
    };
    return device::add_parts<kCount, kThreads>(slot, Pieces<kCluster>::worker() - sharers.first, sharers.parts(),
                                               p.counters + piece.tile * kGroups + group, acc, thread, flag, barrier);
}

// The linear part of the epilogue for a warp's sums of 16 rows (a D fragment, kTokens wide), in their registers.
template <int kTokens, class Acc>
SK_DEVICE void scale_rows(const Mm& p, Acc (&acc)[kTokens / 2], int row0, int token0, uint32_t lane) {
    using namespace device;
    const Epilogue& e = p.epilogue;
    if (e.out_type == Type::i32) return;
    const int row = row0 + lane / 4;
    const RowEpilogue r[2] = {row_epilogue(e, row, row < p.n), row_epilogue(e, row + 8, row + 8 < p.n)};
    SK_UNROLL
    for (int j = 0; j < kTokens / 4; ++j) {  // a column of the lane: tokens 8 (j / 2) + 2t + j % 2
        const int token = token0 + 8 * (j / 2) + 2 * (lane % 4) + j % 2;
        const float scale = token_scale(e, token, token < p.m);
        SK_UNROLL
        for (int i = 0; i < 2; ++i) {
            auto& a = acc[4 * (j / 2) + 2 * i + j % 2];
            a = scale_and_shift(r[i], scale, a);
        }
    }
}

// Staging: a part of a tile in shared memory, a token's kRows outputs beside each other, so that they leave in 16-byte
// pieces. 16-bit outputs: 16-byte chunk c of token t lies at c ^ t % 8. 32-bit outputs, for half as many tokens in the
// same memory: word r of token t lies at r ^ (t / 2 % 4) * 8; a warp writes its fragments without bank conflicts.
template <int kTokens, int kRows, class Acc>
SK_DEVICE void stage_rows_wide(char* staging, const Acc* acc, int row, int token, uint32_t lane) {
    const uint32_t t = token + 2 * (lane % 4), r = row + lane / 4, turn = lane % 4 * 8;  // t / 2 % 4 is lane % 4
    auto* words = reinterpret_cast<uint32_t*>(staging) + t * kRows;
    uint32_t* to[2] = {words + (r ^ turn), words + ((r + 8) ^ turn)};
    SK_UNROLL
    for (int i = 0; i < kTokens / 2; ++i) {
        to[i % 4 / 2][(8 * (i / 4) + i % 2) * kRows] = device::bits_as<uint32_t>(acc[i]);
    }
}

// Writes kTokens staged tokens from (row0, token0) on, by kThreads threads.
template <int kTokens, int kRows, int kThreads, bool kWide>
SK_DEVICE void store_staged(const Mm& p, const char* staging, int row0, int token0, uint32_t thread) {
    using namespace device;
    constexpr int kValues = kWide ? 4 : 8, kPieces = kRows / kValues;
    SK_NO_UNROLL
    for (int i = thread; i < kTokens * kPieces; i += kThreads) {
        const int t = i / kPieces, piece = i % kPieces, row = row0 + piece * kValues;
        const int count = p.n - row < kValues ? p.n - row : kValues;
        if (token0 + t >= p.m || count <= 0) continue;
        const int at = kWide ? piece ^ t / 2 % 4 * 2 : piece ^ t % 8;
        const Vec4 v = *reinterpret_cast<const Vec4*>(staging + t * kRows * (kWide ? 4 : 2) + at * 16);
        uint32_t words[4] = {v.x, v.y, v.z, v.w};
        store_values<kValues>(p.epilogue, p.y, p.y_stride, token0 + t, row, count, words);
    }
}

}  // namespace sk::sp24
