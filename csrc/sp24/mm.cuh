// What every sp24 matrix product is told, and how its work is dealt out: Y[M, N] = epilogue(X[M, K] W[N, K]^T).
#pragma once
#include "../device/epilogue.h"
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

// A worker's share of a tile: blocks [begin, end) of K.
struct Piece {
    int tile, begin, end;
};

// The pieces of one worker: a cluster of kCluster thread blocks. It holds no more than its place, because registers are
// scarce in the kernels; all else comes from the parameters again. 32-bit numbers: launch.cuh refuses work whose blocks
// times workers exceed them.
template <int kCluster>
class Pieces {
public:
    SK_DEVICE Pieces(const Mm& p, int tiles)
        : tiles_(tiles), next_(p.streamed + worker()), unit_(begin_of(p, worker())) {}

    SK_DEVICE bool take(const Mm& p, Piece& piece) {
        const int end = begin_of(p, worker() + 1);
        if (unit_ < end) {
            const int tile = unit_ / p.k_blocks, begin = unit_ - tile * p.k_blocks, left = end - unit_;
            piece = {tile, begin, left < p.k_blocks - begin ? begin + left : p.k_blocks};
            unit_ += piece.end - begin;
            return true;
        }
        if (next_ < tiles_) {
            piece = {next_, 0, p.k_blocks};
            next_ += grid_workers();
            return true;
        }
        return false;
    }

    SK_DEVICE static int worker() { return device::block_x() / kCluster; }

    // The first streamed block of K of a worker, numbered through all tiles; that of the next one is its end.
    SK_DEVICE static int begin_of(const Mm& p, int worker) {
        const int units = p.streamed * p.k_blocks, sharing = units < grid_workers() ? units : grid_workers();
        return worker < sharing ? units * worker / sharing : units;
    }

    // The worker that has a streamed block: the w with begin_of(w) <= unit < begin_of(w + 1).
    SK_DEVICE static int owner(const Mm& p, int unit) {
        const int units = p.streamed * p.k_blocks, sharing = units < grid_workers() ? units : grid_workers();
        return ((unit + 1) * sharing - 1) / units;
    }

private:
    SK_DEVICE static int grid_workers() { return device::grid_x() / kCluster; }

    int tiles_, next_, unit_;
};

// Adds up the parts of a tile in the kThreads threads that hold one part's accumulators (one of kGroups such groups of
// the worker). Returns whether this was the last part to come, which then holds the sum. `flag` is a word of shared
// memory of the group, `barrier` its named barrier.
template <int kCount, int kThreads, int kCluster, int kGroups, class Acc>
SK_DEVICE bool add_parts(const Mm& p, const Piece& piece, int group, Acc* acc, uint32_t thread, uint32_t* flag,
                         uint32_t barrier) {
    using Workers = Pieces<kCluster>;
    if (piece.begin == 0 && piece.end == p.k_blocks) return true;
    const int first = Workers::owner(p, piece.tile * p.k_blocks);
    const int last = Workers::owner(p, piece.tile * p.k_blocks + p.k_blocks - 1);
    // A worker has at most one part that begins its tile (slot 1) and one that does not (slot 0).
    const auto slot = [&](int worker) {
        const int which = 2 * worker + (worker == first);
        return static_cast<Acc*>(p.partials) + (int64_t{which} * kGroups + group) * kCount * kThreads + thread;
    };
    Acc* mine = slot(Workers::worker());
    SK_UNROLL
    for (int i = 0; i < kCount; ++i) mine[i * kThreads] = acc[i];
    uint32_t* counter = p.counters + piece.tile * kGroups + group;
    device::sync_named(barrier, kThreads);
    if (thread == 0) *flag = device::announce(counter);
    device::sync_named(barrier, kThreads);
    if (*flag != static_cast<uint32_t>(last - first)) return false;
    if (thread == 0) *counter = 0;
    SK_UNROLL
    for (int i = 0; i < kCount; ++i) acc[i] = 0;
    SK_NO_UNROLL
    for (int worker = first; worker <= last; ++worker) {
        const Acc* part = slot(worker);
        SK_UNROLL
        for (int i = 0; i < kCount; ++i) {
            if (i % 16 == 0) device::keep_order();  // not all loads at once: they would need registers
            acc[i] += device::load_announced(part + i * kThreads);
        }
    }
    return true;
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
