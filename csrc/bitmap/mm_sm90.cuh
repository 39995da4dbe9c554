// bitmap_mm on Hopper: wgmma with the decoded weight as A from registers, of records in sm90 order.
//
// A tile is kGroups * 64 rows, one record's for each consumer warpgroup, by all tokens. The warps of a group decode
// the four steps of a record side by side, 16 rows each, and multiply them with a slice of 64 columns of the tokens,
// which all groups share. A producer warp brings slices by TMA and records by bulk copies into one ring; a stage has
// room for the longest record of this very weight. While the tensor cores multiply one record, its decoders find the
// places of the next one's values: the products are waited for where their registers are decoded again.
//
// Against mm_sm80, whose warps take 64 rows each: the tokens come from the second level once for kGroups * 64 rows (at
// 16 tokens and two groups that is 22 % beside a record of half density, not 44), decoders spend no instruction on
// copies, matrix loads and products, and the tensor cores read the tokens once for 64 rows of a group.
#pragma once
#include "../device/wgmma.h"
#include "mm.cuh"

namespace sk::bitmap {

template <Type T_, int kTokens_, int kGroups_, int kStages_>
struct MmSm90 {
    using Order = Sm90Order;
    static constexpr Type T = T_;
    static constexpr int kTokens = kTokens_, kGroups = kGroups_, kStages = kStages_, kRows = kGroups * Order::kRows;
    static constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + 32;
    static constexpr int kTokenBytes = kTokens * Order::kColumns * 2;
    static constexpr int kSumFloats = kTokens * kSumPitch;  // of a group
    static constexpr int kCount = kTokens / 2;
    static constexpr int kBlocks = kGroups > 2 ? 1 : kTokens > 16 ? 2 : 3;
    static constexpr int kLeast = 4;  // K blocks of a share: few parts to add up
    static constexpr int kBarriers = kStages * kTokenBytes + kGroups * kSumFloats * 4, kRecords = kBarriers + 128;
    static constexpr int shared_bytes(int record) { return kRecords + kStages * kGroups * record + kSlack; }
    static_assert(kStages * 16 + kGroups * 4 <= 128 && Order::kRows == kSumRows);
};

// The tokens' slices, the sums, barriers and flags, the records.
template <class C>
struct MmSm90Shared {
    uint32_t tokens, full, empty, records;  // addresses
    float* sums;
    uint32_t* flags;

    SK_DEVICE explicit MmSm90Shared(char* memory)
        : tokens(device::shared_address(memory)),
          full(tokens + C::kBarriers),
          empty(full + C::kStages * 8),
          records(tokens + C::kRecords),
          sums(reinterpret_cast<float*>(memory + C::kStages * C::kTokenBytes)),
          flags(reinterpret_cast<uint32_t*>(memory + C::kBarriers + C::kStages * 16)) {}
};

// Rows beyond the weight take the last block's records; nothing is written for them.
SK_DEVICE int first_record(const Mm& p, int row_block) {
    return (row_block < p.row_blocks ? row_block : p.row_blocks - 1) * p.k_blocks;
}

// One warp: its lanes ask for the offsets of the next records together, lane 0 sends for them.
template <class C>
SK_DEVICE void mm_produce(const device::TensorMap* x_map, const Mm& p, const MmSm90Shared<C>& shared,
                          device::Pieces<1> pieces) {
    using namespace device;
    constexpr int kBatch = 31;  // records whose begin and end are among 32 offsets
    const int my_lane = lane();
    RingPlace<C::kStages> place;
    if (my_lane == 0) prefetch_map(x_map);
    Piece piece;
    while (pieces.take(p, piece)) {
        const auto look = [&](int (&offsets)[C::kGroups], int kb) {
            kb += my_lane;
            SK_UNROLL
            for (int g = 0; g < C::kGroups; ++g) {
                const int at = first_record(p, piece.tile * C::kGroups + g) + (kb < p.k_blocks ? kb : p.k_blocks);
                offsets[g] = p.offsets[at];
            }
        };
        int offsets[C::kGroups], next[C::kGroups];
        look(next, piece.begin);
        for (int kb0 = piece.begin; kb0 < piece.end; kb0 += kBatch) {
            SK_UNROLL
            for (int g = 0; g < C::kGroups; ++g) offsets[g] = next[g];
            look(next, kb0 + kBatch);
            for (int j = 0; j < kBatch && kb0 + j < piece.end; ++j, place.next()) {
                int first[C::kGroups], bytes[C::kGroups], all = C::kTokenBytes;
                SK_UNROLL
                for (int g = 0; g < C::kGroups; ++g) {
                    first[g] = shuffle(offsets[g], j);
                    bytes[g] = (shuffle(offsets[g], j + 1) - first[g]) * kUnit;
                    all += bytes[g];
                }
                if (my_lane != 0) continue;
                barrier_wait(shared.empty + 8 * place.stage, place.phase ^ 1);
                const uint32_t full = shared.full + 8 * place.stage;
                barrier_expect(full, all);
                load_box(shared.tokens + place.stage * C::kTokenBytes, x_map, (kb0 + j) * C::Order::kColumns, 0, full,
                         bytes_of(C::T));
                SK_UNROLL
                for (int g = 0; g < C::kGroups; ++g) {
                    load_bytes(shared.records + (place.stage * C::kGroups + g) * p.record_bytes,
                               p.records + int64_t{first[g]} * kUnit, bytes[g], full);
                }
            }
        }
    }
}

template <class C>
SK_DEVICE void mm_consume(const Mm& p, const MmSm90Shared<C>& shared, device::Pieces<1> pieces) {
    using namespace device;
    using O = typename C::Order;
    const uint32_t group = warp_index() / 4, step = warp_index() % 4, thread = thread_index() % 128, my_lane = lane();
    const uint64_t b0 = product_descriptor(shared.tokens);
    const Turns turns(my_lane);
    float* sums = shared.sums + group * C::kSumFloats;
    RingPlace<C::kStages> place;
    uint32_t a[4][4];
    float acc[C::kCount];
    // All lanes have met, after their last look at a stage, at the wait for its products.
    const auto release = [&](uint32_t stage) {
        if (my_lane == 0) barrier_arrive(shared.empty + 8 * stage);
    };

    Piece piece;
    while (pieces.take(p, piece)) {
        SK_NO_UNROLL
        for (int kb = piece.begin; kb < piece.end; ++kb, place.next()) {
            barrier_wait(shared.full + 8 * place.stage, place.phase);
            const uint32_t record = shared.records + (place.stage * C::kGroups + group) * p.record_bytes;
            const uint32_t bits = load_shared_word(record + O::kBits + (32 * step + my_lane) * 4);
            uint32_t values = record + load_shared_half<0>(record + 2 * step);
            const Places where = places(bits, turns);
            wait_products<0>();
            if (kb > piece.begin) release(place.before());
            SK_UNROLL
            for (int i = 0; i < 4; ++i) decode(a[i], bits, where, i, values);
            const uint64_t b = b0 + (place.stage * C::kTokenBytes >> 4);
            fence_products();
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {  // 16 columns are 32 bytes
                product<C::T, C::kTokens>(acc, a[i], b + 2 * i, i > 0 || kb > piece.begin);
            }
            commit_products();
        }
        wait_products<0>();
        release(place.before());

        const int tile = piece.tile * C::kGroups + group;
        if (piece.begin != 0 || piece.end != p.k_blocks) {
            const auto sharers = Sharers::of<1>(p, piece);
            const auto slot = [&](int part) {
                return p.partials + (int64_t{sharers.slot(part)} * C::kGroups + group) * C::kCount * 128 + thread;
            };
            const int part = pieces.worker() - sharers.first;
            if (!add_parts<C::kCount, 128>(slot, part, sharers.parts(), p.counters + tile, acc, thread,
                                           shared.flags + group, 1 + group))
                continue;
        }
        put_sums<C::kTokens>(sums, acc, 16 * step, my_lane);
        sync_named(1 + group, 128);
        store_sums<128>(p, sums, tile * kSumRows, thread);
        sync_named(1 + group, 128);  // the next tile's sums may come
    }
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
bitmap_mm_sm90(SK_PARAM device::TensorMap x_map, SK_PARAM Mm p) {
    using namespace device;
    const MmSm90Shared<C> shared(shared_memory());
    if (thread_index() == 0) {
        for (int s = 0; s < C::kStages; ++s) {
            barrier_init(shared.full + 8 * s, 1);
            barrier_init(shared.empty + 8 * s, C::kGroups * 4);  // every consumer warp
        }
        fence_barrier_init();
    }
    sync_block();
    const Pieces<1> pieces(p, p.streamed);
    if (warp_index() == C::kConsumers / 32) {
        mm_produce<C>(&x_map, p, shared, pieces);
    } else {
        mm_consume<C>(p, shared, pieces);
    }
}

}  // namespace sk::bitmap
