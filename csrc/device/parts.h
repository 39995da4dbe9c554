// Work that several blocks share: how a stream of it is dealt out, and how their sums become one.
#pragma once
#include "copy.h"

namespace sk::device {

// A worker's share of a tile: blocks [begin, end) of K.
struct Piece {
    int tile, begin, end;
};

// The pieces of one worker, a cluster of kCluster thread blocks. Of the parameters p it reads k_blocks, a tile's blocks
// of K, and streamed: so many tiles are cut along K, so that every worker gets the same share of them; the others are
// dealt out whole. It holds no more than its place, because registers are scarce in the kernels. 32-bit numbers:
// launchers refuse work whose blocks times workers exceed them (`fits`).
template <int kCluster>
class Pieces {
public:
    template <class P>
    SK_DEVICE Pieces(const P& p, int tiles)
        : tiles_(tiles), next_(p.streamed + worker()), unit_(begin_of(p, worker())) {}

    template <class P>
    SK_DEVICE bool take(const P& p, Piece& piece) {
        const int end = begin_of(p, worker() + 1);
        if (unit_ < end) {
            const int tile = unit_ / p.k_blocks, begin = unit_ - tile * p.k_blocks, left = end - unit_;
            piece = {tile, begin, left < p.k_blocks - begin ? begin + left : p.k_blocks};
            unit_ += piece.end - begin;
            return true;
        }
        if (next_ < tiles_) {
            piece = {next_, 0, p.k_blocks};
            next_ += workers();
            return true;
        }
        return false;
    }

    SK_DEVICE static int worker() { return block_x() / kCluster; }
    SK_DEVICE static int workers() { return grid_x() / kCluster; }

    // The first streamed block of K of a worker, numbered through all tiles; that of the next one is its end.
    template <class P>
    SK_DEVICE static int begin_of(const P& p, int worker) {
        const int units = p.streamed * p.k_blocks, sharing = units < workers() ? units : workers();
        return worker < sharing ? units * worker / sharing : units;
    }

    // The worker that has a streamed block: the w with begin_of(w) <= block < begin_of(w + 1).
    template <class P>
    SK_DEVICE static int owner(const P& p, int block) {
        const int units = p.streamed * p.k_blocks, sharing = units < workers() ? units : workers();
        return ((block + 1) * sharing - 1) / units;
    }

private:
    int tiles_, next_, unit_;
};

// The workers that have parts of a tile, and where a worker leaves its part: it has at most one that begins its tile
// (slot 1) and one that does not (slot 0).
struct Sharers {
    int first, last;

    template <int kCluster, class P>
    SK_DEVICE static Sharers of(const P& p, const Piece& piece) {
        const int begin = piece.tile * p.k_blocks;
        return {Pieces<kCluster>::owner(p, begin), Pieces<kCluster>::owner(p, begin + p.k_blocks - 1)};
    }
    SK_DEVICE int parts() const { return last - first + 1; }
    SK_DEVICE int slot(int part) const { return 2 * (first + part) + (part == 0); }
};

SK_ANYWHERE bool fits(int64_t tiles, int64_t k_blocks, int64_t workers) {
    return (tiles * k_blocks + 1) * (workers + 1) <= INT32_MAX;
}

// Adds up `parts` parts of a tile, each held as kCount accumulators in each of kThreads threads. slot(i) is where this
// thread's first accumulator of part i is left; the next one follows kThreads further on. Returns whether this part was
// the last to come, which then holds the sum of all in their order: the result does not depend on who is last.
// `counter` is zero before and after, `flag` a word of shared memory of these threads, `barrier` their named barrier.
template <int kCount, int kThreads, class Acc, class Slot>
SK_DEVICE bool add_parts(Slot slot, int part, int parts, uint32_t* counter, Acc* acc, uint32_t thread, uint32_t* flag,
                         uint32_t barrier) {
    Acc* mine = slot(part);
    SK_UNROLL
    for (int i = 0; i < kCount; ++i) mine[i * kThreads] = acc[i];
    sync_named(barrier, kThreads);
    if (thread == 0) *flag = announce(counter);
    sync_named(barrier, kThreads);
    if (*flag != static_cast<uint32_t>(parts - 1)) return false;
    if (thread == 0) *counter = 0;
    SK_UNROLL
    for (int i = 0; i < kCount; ++i) acc[i] = 0;
    SK_NO_UNROLL
    for (int other = 0; other < parts; ++other) {
        const Acc* from = slot(other);
        SK_UNROLL
        for (int i = 0; i < kCount; ++i) {
            if (i % 16 == 0) keep_order();  // not all loads at once: they would need registers
            acc[i] += load_announced(from + i * kThreads);
        }
    }
    return true;
}

}  // namespace sk::device
