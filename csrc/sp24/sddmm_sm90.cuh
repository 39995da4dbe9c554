// sp24_sddmm on Hopper: dW = dY^T X at the kept positions, the dense gradient never in memory.
//
// A dense product by wgmma whose operands both lie in shared memory as they lie in global memory, tokens as rows (the
// tensor cores read them column by column), and whose epilogue keeps two of every four sums, by the metadata. A tile is
// 128 rows x 256 columns of W; a producer brings 64 tokens of dY and X at a time, and a cluster's blocks, whose rows
// are neighbours, share X. Otherwise it is mm_sm90: a ring, persistent blocks, parts of tiles that are added in their
// order.
//
// Per stage and SM: two warpgroups' 4 wgmma of 64 x 256 x 16 take 1024 cycles and read 80 KB of shared memory; 16 KB of
// dY and, with a cluster of two, 16 KB of X come from the second level: 32 bytes a cycle.
#pragma once
#include "mm_sm90.cuh"

namespace sk::sp24 {

struct Sddmm {
    const uint8_t* metadata;  // [n, metadata_stride]
    uint32_t* values;         // pairs of 16 bits, [n, pairs]
    int64_t metadata_stride;
    int pairs;  // groups of a row
    int n, k;
    int k_blocks, streamed;  // of tokens, see device/parts.h
    float* partials;
    uint32_t* counters;
};

template <Type T_, int kStages_, int kCluster_>
struct SddmmSm90 {
    static constexpr Type T = T_;
    static constexpr int kStages = kStages_, kCluster = kCluster_;
    static constexpr int kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
    static constexpr int kRows = 64 * kWarpgroups, kColumns = 256, kTokens = 64;  // of W; of a stage
    static constexpr int kBoxBytes = kTokens * 128, kRowBoxes = kRows / 64, kColumnBoxes = kColumns / 64;
    static constexpr int kStageBytes = (kRowBoxes + kColumnBoxes) * kBoxBytes;
    static constexpr int kPairs = kColumns / 4;
    static constexpr int kStagingBytes = 64 * kPairs * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes + kWarpgroups * kStagingBytes + 256;
    static_assert(is_wide(T) && kColumnBoxes % kCluster == 0 && kSharedBytes <= 227 * 1024);
};

template <class C>
SK_DEVICE void sddmm_produce(const device::TensorMap* dy_map, const device::TensorMap* x_map, const Sddmm& p,
                             const MmSm90Shared<C>& shared, Pieces<C::kCluster> pieces, int row_tiles,
                             int column_tiles) {
    using namespace device;
    const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
    RingPlace<C::kStages> place;
    prefetch_map(dy_map);
    prefetch_map(x_map);
    Piece piece;
    while (pieces.take(p, piece)) {
        const Tile tile = tile_at(piece.tile, row_tiles, column_tiles);
        const int row = (tile.rows * C::kCluster + rank) * C::kRows, column = tile.tokens * C::kColumns;
        for (int kb = piece.begin; kb < piece.end; ++kb, place.next()) {
            barrier_wait(shared.empty + 8 * place.stage, place.phase ^ 1);
            const uint32_t full = shared.full + 8 * place.stage, to = shared.stages + place.stage * C::kStageBytes;
            const int token = kb * C::kTokens;
            barrier_expect(full, C::kStageBytes);
            SK_UNROLL
            for (int i = 0; i < C::kRowBoxes; ++i) {
                load_box(to + i * C::kBoxBytes, dy_map, row + 64 * i, token, full, bytes_of(C::T));
            }
            SK_UNROLL
            for (int i = 0; i < C::kColumnBoxes / C::kCluster; ++i) {
                const int box = rank * (C::kColumnBoxes / C::kCluster) + i;
                const uint32_t at = to + (C::kRowBoxes + box) * C::kBoxBytes;
                if constexpr (C::kCluster > 1) {
                    load_box_multicast(at, x_map, column + 64 * box, token, full, (1 << C::kCluster) - 1,
                                       bytes_of(C::T));
                } else {
                    load_box(at, x_map, column + 64 * box, token, full, bytes_of(C::T));
                }
            }
        }
    }
}

// The kept pairs of a warpgroup's 64 rows and 256 columns, through its staging memory: pair i of row r lies in 16-byte
// chunk i / 4 ^ r % 8 of the row.
template <class C>
SK_DEVICE void sddmm_store(const Sddmm& p, const float (&acc)[128], int row0, int column0, char* staging,
                           uint32_t thread, uint32_t barrier) {
    using namespace device;
    const uint32_t t = thread % 4, odd = t % 2;
    // Lanes t = 2 i and 2 i + 1 have the two halves of a group in rows g and g + 8; each takes one of the rows.
    const uint32_t mine = 16 * (thread / 32) + thread / 4 % 8 + 8 * odd;
    const int row = row0 + mine;
    const uint8_t* metadata = p.metadata + row * p.metadata_stride;
    auto* words = reinterpret_cast<uint32_t*>(staging) + mine * C::kPairs;
    SK_UNROLL
    for (int j = 0; j < C::kColumns / 8; ++j) {
        const uint32_t upper = pack_output(C::T, acc[4 * j], acc[4 * j + 1]);
        const uint32_t lower = pack_output(C::T, acc[4 * j + 2], acc[4 * j + 3]);
        const uint32_t other = shuffle_xor(odd ? upper : lower, 1);
        const int byte = column0 / 8 + j;
        const uint32_t two = row < p.n && byte < p.metadata_stride ? metadata[byte] : 0xEE;
        const uint32_t nibble = two >> 4 * (t / 2) & 15;
        const uint32_t selector = 0x1010 + (nibble & 3) * 0x22 + (nibble >> 2) * 0x2200;
        const uint32_t pair = 2 * j + t / 2;
        words[pair ^ mine % 8 * 4] = permute_bytes(odd ? other : upper, odd ? lower : other, selector);
    }
    sync_named(barrier, 128);
    constexpr int kChunks = C::kPairs / 4;
    SK_NO_UNROLL
    for (int i = thread; i < 64 * kChunks; i += 128) {
        const int r = i / kChunks, chunk = i % kChunks, pair = column0 / 4 + 4 * chunk;
        if (row0 + r >= p.n || pair >= p.pairs) continue;
        const Vec4 v = *reinterpret_cast<const Vec4*>(staging + r * C::kPairs * 4 + (chunk ^ r % 8) * 16);
        uint32_t* to = p.values + int64_t{row0 + r} * p.pairs + pair;
        if (pair + 4 <= p.pairs && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
            *reinterpret_cast<Vec4*>(to) = v;
        } else {
            const uint32_t all[4] = {v.x, v.y, v.z, v.w};
            SK_UNROLL
            for (int e = 0; e < 4; ++e) {
                if (pair + e < p.pairs) to[e] = all[e];
            }
        }
    }
    sync_named(barrier, 128);
}

template <class C>
SK_DEVICE void sddmm_consume(const Sddmm& p, const MmSm90Shared<C>& shared, Pieces<C::kCluster> pieces, int row_tiles,
                             int column_tiles) {
    using namespace device;
    const uint32_t thread = thread_index() % 128, group = thread_index() / 128 - 1, barrier = 1 + group;
    const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
    const uint64_t a0 = product_descriptor_columns(shared.stages + group * C::kBoxBytes, C::kBoxBytes);
    const uint64_t b0 = product_descriptor_columns(shared.stages + C::kRowBoxes * C::kBoxBytes, C::kBoxBytes);
    RingPlace<C::kStages> place;
    float acc[128];

    Piece piece;
    while (pieces.take(p, piece)) {
        const Tile tile = tile_at(piece.tile, row_tiles, column_tiles);
        SK_NO_UNROLL
        for (int kb = piece.begin; kb < piece.end; ++kb, place.next()) {
            barrier_wait(shared.full + 8 * place.stage, place.phase);
            const uint32_t stage = place.stage * C::kStageBytes >> 4;
            fence_products();
            SK_UNROLL
            for (int s = 0; s < C::kTokens / 16; ++s) {  // 16 tokens are two atoms
                product_columns<C::T>(acc, a0 + stage + s * (2048 >> 4), b0 + stage + s * (2048 >> 4),
                                      s > 0 || kb > piece.begin);
            }
            commit_products();
            wait_products<1>();
            if (kb > piece.begin) mm_release<C>(shared, place.before());
        }
        wait_products<0>();
        mm_release<C>(shared, place.before());

        if (piece.begin != 0 || piece.end != p.k_blocks) {
            const auto sharers = device::Sharers::of<C::kCluster>(p, piece);
            constexpr int kGroups = C::kCluster * C::kWarpgroups;
            const int part_of = rank * C::kWarpgroups + group;
            const auto slot = [&](int part) {
                return p.partials + (int64_t{sharers.slot(part)} * kGroups + part_of) * 128 * 128 + thread;
            };
            if (!device::add_parts<128, 128>(slot, Pieces<C::kCluster>::worker() - sharers.first, sharers.parts(),
                                             p.counters + piece.tile * kGroups + part_of, acc, thread,
                                             shared.flags + group, barrier)) {
                continue;
            }
        }
        const int row0 = (tile.rows * C::kCluster + rank) * C::kRows + 64 * group;
        sddmm_store<C>(p, acc, row0, tile.tokens * C::kColumns, shared.staging + group * C::kStagingBytes, thread,
                       barrier);
    }
}

template <class C>
SK_KERNEL(C::kThreads, 1)
sp24_sddmm_sm90(SK_PARAM device::TensorMap dy_map, SK_PARAM device::TensorMap x_map, SK_PARAM Sddmm p) {
    using namespace device;
    const int row_tiles = (p.n + C::kCluster * C::kRows - 1) / (C::kCluster * C::kRows);
    const int column_tiles = (p.k + C::kColumns - 1) / C::kColumns;
    ring_roles<C>(
        p, row_tiles * column_tiles,
        [&](const auto& shared, const auto& pieces) {
            sddmm_produce<C>(&dy_map, &x_map, p, shared, pieces, row_tiles, column_tiles);
        },
        [&](const auto& shared, const auto& pieces) { sddmm_consume<C>(p, shared, pieces, row_tiles, column_tiles); });
}

}  // namespace sk::sp24
