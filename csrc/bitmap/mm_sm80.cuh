// bitmap_mm on every card: mma.m16n8k16 of records in sm80 order.
//
// In a worker the warps take tiles in turn. A warp keeps kStages - 1 records and the tokens' slices that go with them
// on their way by cp.async, and decodes them from shared memory straight into the registers of its products, without
// ever waiting for another warp. A stage has room for the longest record of this very weight. At the end of a row block
// the warps' sums are added in their order.
//
// One token costs what eight do: the rest of its slice is filled with zeros that are not read.
#pragma once
#include "../device/mma.h"
#include "mm.cuh"

namespace sk::bitmap {

template <Type T_, int kTokens_, int kWarps_, int kStages_>
struct MmSm80 {
    using Order = Sm80Order;
    static constexpr Type T = T_;
    static constexpr int kTokens = kTokens_, kWarps = kWarps_, kStages = kStages_, kRows = Order::kRows;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kTokenBytes = kTokens * Order::kColumns * 2;
    static constexpr int kSumFloats = kTokens * kSumPitch;  // of a warp
    static constexpr int kSumBytes = kWarps * kSumFloats * 4 + 16;
    static constexpr int kCount = kTokens * kSumRows / kThreads;
    static constexpr int kBlocks = kTokens <= 16 ? 2 : 1;
    static constexpr int kLeast = kWarps;  // tiles of a share: one for every warp
    static constexpr int shared_bytes(int record) {
        return kSumBytes + kWarps * kStages * (kTokenBytes + record) + kSlack;
    }
    static_assert(kTokens * kSumRows % kThreads == 0 && kThreads % kSumRows == 0 && kStages >= 2);
};

// 32 columns of the tokens, 64 bytes each; 16-byte chunk c of token t lies at c ^ t / 2 % 4: ldmatrix meets no
// conflict.
template <int kTokens>
SK_DEVICE void copy_tokens(const Mm& p, uint32_t to, int kb, uint32_t lane) {
    using namespace device;
    const int chunk = lane % 4, column = kb * Sm80Order::kColumns + chunk * 8;
    const char* from = p.x + (static_cast<int>(lane / 4) * p.x_stride + column) * 2;
    SK_UNROLL
    for (int i = 0; i < kTokens; i += 8) {
        const int token = i + lane / 4;
        const uint32_t at = to + token * 64 + (chunk ^ (token / 2 % 4)) * 16;
        const auto copy = [&]<int kBytes>() {
            SK_UNROLL
            for (int j = 0; j < 16; j += kBytes) {
                const bool valid = token < p.m && column + j / 2 < p.k;
                copy_async<kBytes>(at + j, valid ? from + j : p.x, valid);
            }
        };
        if (p.x_align == 16) {
            copy.template operator()<16>();
        } else if (p.x_align == 8) {
            copy.template operator()<8>();
        } else {
            copy.template operator()<4>();
        }
        from += p.x_stride * 16;
    }
}

// The B operands of step s, from a slice of the tokens at this shared address: two of eight tokens at once.
template <int kTokens>
SK_DEVICE void load_tokens(uint32_t (&b)[kTokens / 8][2], uint32_t slice, int s, uint32_t lane) {
    constexpr int kTiles = kTokens / 8;
    SK_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
        const uint32_t second = kTiles > 1 ? lane / 16 : 0, token = 8 * (j + second) + lane % 8;
        const uint32_t chunk = 2 * s + lane / 8 % 2;
        uint32_t both[4];
        device::load_matrices(both, slice + token * 64 + (chunk ^ (token / 2 % 4)) * 16);
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (j + i / 2 < kTiles) b[j + i / 2][i % 2] = both[i];
        }
    }
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
bitmap_mm_sm80(SK_PARAM Mm p) {
    using namespace device;
    using O = typename C::Order;
    constexpr Type T = C::T;
    char* memory = shared_memory();
    auto* sums = reinterpret_cast<float*>(memory);
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kSumBytes - 16);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    const int stage_bytes = C::kTokenBytes + p.record_bytes;
    char* ring = memory + C::kSumBytes + warp * C::kStages * stage_bytes;

    Pieces<1> pieces(p, p.row_blocks);
    const int begin = pieces.begin_of(p, pieces.worker()), end = pieces.begin_of(p, pieces.worker() + 1);
    int ahead = begin + warp, ahead_kb = ahead % p.k_blocks;
    int into = 0, from = 0;  // stages
    // Where the next record lies is asked for one load before it is needed.
    int first = 0, last = 0;
    const auto look = [&] {
        if (ahead < end) {
            first = p.offsets[ahead];
            last = p.offsets[ahead + 1];
        }
    };
    look();
    const auto load = [&] {
        if (ahead < end) {
            const uint32_t to = shared_address(ring + into * stage_bytes);
            copy_tokens<C::kTokens>(p, to, ahead_kb, my_lane);
            const char* record = p.records + int64_t{first} * kUnit;
            const int bytes = (last - first) * kUnit;
            SK_NO_UNROLL
            for (int i = my_lane * 16; i < bytes; i += 512) {
                copy_async<16>(to + C::kTokenBytes + i, record + i, true);
            }
        }
        commit_copies();
        ahead += C::kWarps;
        ahead_kb += C::kWarps;
        while (ahead_kb >= p.k_blocks) ahead_kb -= p.k_blocks;
        look();
        into = into + 1 == C::kStages ? 0 : into + 1;
    };
    SK_UNROLL
    for (int s = 0; s < C::kStages - 1; ++s) load();

    const Turns turns(my_lane);
    int mine = begin + warp;
    Piece piece;
    while (pieces.take(p, piece)) {
        const int stop = piece.tile * p.k_blocks + piece.end;
        float acc[4][C::kTokens / 2] = {};
        SK_NO_UNROLL
        for (; mine < stop; mine += C::kWarps) {
            wait_copies<C::kStages - 2>();
            sync_warp();  // every lane's copies are here, and every lane is done with the stage that is loaded next
            load();
            const char* stage = ring + from * stage_bytes;
            const char* record = stage + C::kTokenBytes;
            uint32_t values = shared_address(record) + O::kValues;
            SK_UNROLL
            for (int s = 0; s < O::kSteps; ++s) {
                const uint32_t bits = reinterpret_cast<const uint32_t*>(record + O::kBits)[32 * s + my_lane];
                const Places where = places(bits, turns);
                uint32_t b[C::kTokens / 8][2];
                load_tokens<C::kTokens>(b, shared_address(stage), s, my_lane);
                SK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    uint32_t a[4];
                    decode(a, bits, where, i, values);
                    SK_UNROLL
                    for (int j = 0; j < C::kTokens / 8; ++j) mma<T>(acc[i] + 4 * j, a, b[j]);
                }
            }
            from = from + 1 == C::kStages ? 0 : from + 1;
        }
        SK_UNROLL
        for (int i = 0; i < 4; ++i) put_sums<C::kTokens>(sums + warp * C::kSumFloats, acc[i], 16 * i, my_lane);
        sync_block();
        float sum[C::kCount];
        const auto place = [&](int i) {
            const int at = i * C::kThreads + thread;
            return at / kSumRows * kSumPitch + at % kSumRows;
        };
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) {
            sum[i] = 0;
            SK_UNROLL
            for (int w = 0; w < C::kWarps; ++w) sum[i] += sums[w * C::kSumFloats + place(i)];
        }
        if (piece.begin != 0 || piece.end != p.k_blocks) {
            const auto sharers = Sharers::of<1>(p, piece);
            const auto slot = [&](int part) {
                return p.partials + int64_t{sharers.slot(part)} * C::kCount * C::kThreads + thread;
            };
            uint32_t* counter = p.counters + piece.tile;
            const int part = pieces.worker() - sharers.first;
            if (!add_parts<C::kCount, C::kThreads>(slot, part, sharers.parts(), counter, sum, thread, flag, 0))
                continue;
        } else {
            sync_block();  // everybody has read the sums
        }
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) sums[place(i)] = sum[i];
        // Each thread takes what it has put there itself.
        store_sums<C::kThreads>(p, sums, piece.tile * kSumRows, thread);
        sync_block();  // the next piece's sums may come
    }
    wait_copies<0>();
}

}  // namespace sk::bitmap
