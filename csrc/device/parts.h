// Work that several blocks share: how a stream of it is dealt out, and how their sums become one.
#pragma once
#include "copy.h"

namespace sk::device {

// A worker's share of a tile: blocks [begin, end) of K. Workers first .. last have parts of it.
struct Piece {
    int tile, begin, end, first, last;
    SK_DEVICE bool whole() const { return first == last; }
};

// The first `streamed` tiles are cut along K so that every worker gets the same share of them; the others are dealt out
// whole.
class Pieces {
public:
    SK_DEVICE Pieces(int worker, int workers, int tiles, int streamed, int k_blocks)
        : worker_(worker), workers_(workers), tiles_(tiles), k_blocks_(k_blocks), next_(streamed + worker) {
        units_ = int64_t{streamed} * k_blocks;
        sharing_ = units_ < workers ? static_cast<int>(units_) : workers;
        unit_ = worker < sharing_ ? units_ * worker / sharing_ : 0;
        end_ = worker < sharing_ ? units_ * (worker + 1) / sharing_ : 0;
    }

    SK_DEVICE bool take(Piece& piece) {
        if (unit_ < end_) {
            const int tile = static_cast<int>(unit_ / k_blocks_), begin = static_cast<int>(unit_ % k_blocks_);
            const int64_t left = end_ - unit_;
            const int end = left < k_blocks_ - begin ? begin + static_cast<int>(left) : k_blocks_;
            piece = {tile, begin, end, owner(int64_t{tile} * k_blocks_),
                     owner(int64_t{tile} * k_blocks_ + k_blocks_ - 1)};
            unit_ += end - begin;
            return true;
        }
        if (next_ < tiles_) {
            piece = {next_, 0, k_blocks_, worker_, worker_};
            next_ += workers_;
            return true;
        }
        return false;
    }

    // The streamed blocks that are left, numbered through all tiles.
    SK_DEVICE int64_t unit() const { return unit_; }
    SK_DEVICE int64_t end() const { return end_; }

private:
    // The worker w with floor(w * units / sharing) <= unit < floor((w + 1) * units / sharing).
    SK_DEVICE int owner(int64_t unit) const { return static_cast<int>(((unit + 1) * sharing_ - 1) / units_); }

    int worker_, workers_, tiles_, k_blocks_, next_, sharing_;
    int64_t units_, unit_, end_;
};

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
