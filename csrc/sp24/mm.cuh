// What every sp24 matrix product is told, and how its work is dealt out: Y[M, N] = epilogue(X[M, K] W[N, K]^T).
#pragma once
#include "../device/epilogue.h"
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
    int x_align;               // 16, 8 or 4: bytes that divide every row's address and length
    // The first `streamed` tiles are cut along K so that every worker gets the same share of them; the others are dealt
    // out whole. A worker that has a part of a tile leaves its sums in `partials` (two slots a worker); the last to
    // arrive at the tile's counter adds the parts in their order, so the result does not depend on who is last.
    // Counters are zero before and after.
    int streamed;
    void* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
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

using device::Piece;
using device::Pieces;

// Adds up the parts of a tile in the kThreads threads that hold one part's accumulators (one of kGroups such groups of
// the worker). Returns whether this was the last part to come, which then holds the sum. `flag` is a word of shared
// memory of the group, `barrier` its named barrier.
template <int kCount, int kThreads, int kGroups, class Acc>
SK_DEVICE bool add_parts(const Mm& p, const Piece& piece, int worker, int group, Acc* acc, uint32_t thread,
                         uint32_t* flag, uint32_t barrier) {
    if (piece.whole()) return true;
    // A worker has at most one part that begins its tile (slot 1) and one that does not (slot 0).
    const auto slot = [&](int part) {
        const int64_t place = int64_t{2} * (piece.first + part) + (part == 0);
        return static_cast<Acc*>(p.partials) + (place * kGroups + group) * kCount * kThreads + thread;
    };
    return device::add_parts<kCount, kThreads>(slot, worker - piece.first, piece.last - piece.first + 1,
                                               p.counters + piece.tile * kGroups + group, acc, thread, flag, barrier);
}

// Turns a warp's sums of 16 rows (a D fragment, kTokens wide) into outputs, in their registers.
template <int kTokens, class Acc>
SK_DEVICE void finish_rows(const Mm& p, Acc (&acc)[kTokens / 2], int row0, int token0, uint32_t lane) {
    using namespace device;
    const Epilogue& e = p.epilogue;
    if (e.out_type == Type::i32) return;
    const int row = row0 + lane / 4;
    const RowEpilogue r[2] = {row_epilogue(e, row, row < p.n), row_epilogue(e, row + 8, row + 8 < p.n)};
    with_activation(e.activation, [&]<Activation A>() {
        SK_UNROLL
        for (int j = 0; j < kTokens / 4; ++j) {  // a column of the lane: tokens 8 (j / 2) + 2t + j % 2
            const int token = token0 + 8 * (j / 2) + 2 * (lane % 4) + j % 2;
            const float scale = token_scale(e, token, token < p.m);
            SK_UNROLL
            for (int i = 0; i < 2; ++i) {
                auto& a = acc[4 * (j / 2) + 2 * i + j % 2];
                a = finish<A>(r[i], scale, a);
            }
        }
    });
}

// Writes a warp's 16 finished rows as 32-bit outputs.
template <int kTokens, class Acc>
SK_DEVICE void store_rows_wide(const Mm& p, const Acc (&acc)[kTokens / 2], int row0, int token0, uint32_t lane) {
    SK_UNROLL
    for (int i = 0; i < kTokens / 2; ++i) {
        const int row = row0 + lane / 4 + i % 4 / 2 * 8, token = token0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        if (row < p.n && token < p.m) device::store_wide(p.epilogue, p.y, p.y_stride, token, row, acc[i]);
    }
}

}  // namespace sk::sp24
