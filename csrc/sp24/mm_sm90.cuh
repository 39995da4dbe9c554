// sp24_mm on Hopper: wgmma.mma_async.sp with the compressed weight as A from registers.
//
// A tile is kRows = kWarpgroups * kM * 64 out-features by kTokens tokens. One producer warp brings the tokens' slice of
// K by TMA into a ring of stages, shared by a cluster's blocks (they have neighbouring rows and the same tokens)
// through multicast; of the windows of images it brings the pixels of one tap (im2col mode). The consumers take their
// fragments straight from global memory into registers, kAhead blocks of K ahead (fragment order: whole 16-byte loads),
// so shared memory serves B alone, whose reads bound a sparse wgmma. One group of products is always in flight: a stage
// and a register set are free again when the next group is waited for. The consumers do not wait for each other: with a
// deep ring one runs ahead, and its epilogue hides behind the other's products. Blocks are persistent; tiles run in
// groups of tokens so that a wave stays in the second-level cache.
//
// Per block of K (128 bytes) and SM, a tile of 256 rows x 128 tokens: four wgmma steps of 64 x 128 x 32 take 512
// cycles; they read 64 KB of B from shared memory (128 B a cycle, all that its port has), the TMA writes 16 KB of it
// (32 B a cycle). From the second level come 18 KB of fragments and, with a cluster of two, 8 KB of tokens: 52 B a
// cycle, where an H100's gives some 30. 128 rows x 256 tokens in clusters of four ask for 34 and write 64 B a cycle
// into shared memory: which of these bounds is the real one only a card can tell. (Three consumer warpgroups of 64 x
// 256 would ask for 29, but ptxas finds no registers for them.)
//
// fp8 products are summed in some 14 bits inside of the tensor cores. Where kPromotes, every block of K (128 columns,
// 64 of them stored: half as many products as dense kernels usually leave to the tensor cores) is summed from zero, 64
// tokens at a time in one of two sets of 32 registers, and added to the accumulators by the CUDA cores while the next
// 64 tokens' products are in flight: for each warp 32 additions beside 64 cycles of the tensor cores. Between blocks of
// K a warpgroup has nothing in flight, but the other one has.
#pragma once
#include "../device/mma.h"
#include "../device/wgmma.h"
#include "mm.cuh"

namespace sk::sp24 {

template <Type T_, int kM_, int kTokens_, int kStages_, int kCluster_, bool kPromotes_ = false>
struct MmSm90 {
    static constexpr Type T = T_;
    static constexpr bool kPromotes = kPromotes_;
    static constexpr int kPartTokens = 64, kPerRow = kTokens_ / kPartTokens, kParts = kM_ * kPerRow;
    static constexpr int kM = kM_, kTokens = kTokens_, kStages = kStages_, kCluster = kCluster_;
    static constexpr int kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
    static constexpr bool kImages = device::is_wide(T);  // X may be the windows of images
    // Sets of fragments: 8-bit blocks have two words of metadata, and two blocks of them ahead do not fit.
    static constexpr int kAhead = kM * kTokens >= 256 && !device::is_wide(T) ? 1 : 2, kSets = kAhead + 1;
    static constexpr int kRows = kWarpgroups * kM * kBlockRows;
    static constexpr int kStageBytes = kTokens * 128;
    static constexpr int kStagingTokens = kTokens % 128 ? 64 : 128;
    static constexpr int kStagingBytes = kStagingTokens * 128;  // 64 rows of 16-bit outputs, for each warpgroup
    static constexpr int kSharedBytes = kStages * kStageBytes + kWarpgroups * kStagingBytes + 256;
    static_assert(kTokens / kCluster % 8 == 0, "a block's share of a box is whole swizzle atoms");
    static_assert(kStages * 16 + kWarpgroups * 4 <= 256 && kSharedBytes <= 227 * 1024);
    static_assert(!kPromotes || (T == Type::e4m3 && kTokens % kPartTokens == 0 && kParts > 1));
};

template <class C>
struct MmSm90Shared {
    uint32_t stages, full, empty;  // addresses
    char* staging;
    uint32_t* flags;

    SK_DEVICE MmSm90Shared(char* memory) {
        stages = device::shared_address(memory);
        staging = memory + C::kStages * C::kStageBytes;
        char* rest = staging + C::kWarpgroups * C::kStagingBytes;
        full = device::shared_address(rest);
        empty = full + C::kStages * 8;
        flags = reinterpret_cast<uint32_t*>(rest + C::kStages * 16);
    }
};

template <class C>
SK_DEVICE void mm_produce(const device::TensorMap* x_map, const Mm& p, const MmSm90Shared<C>& shared,
                          Pieces<C::kCluster> pieces, int row_tiles, int token_tiles) {
    using namespace device;
    constexpr int kShare = C::kTokens / C::kCluster;
    const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
    RingPlace<C::kStages> place;
    prefetch_map(x_map);
    Piece piece;
    while (pieces.take(p, piece)) {
        const int token = tile_at(piece.tile, row_tiles, token_tiles).tokens * C::kTokens + rank * kShare;
        [[maybe_unused]] Window window{};
        if constexpr (C::kImages) {
            if (p.images.kernel_w) window = window_at(p.images, token);
        }
        for (int kb = piece.begin; kb < piece.end; ++kb, place.next()) {
            barrier_wait(shared.empty + 8 * place.stage, place.phase ^ 1);
            const uint32_t full = shared.full + 8 * place.stage;
            barrier_expect(full, C::kStageBytes);
            const uint32_t to = shared.stages + place.stage * C::kStageBytes + rank * kShare * 128;
            const int column = kb * block_k(C::T);
            if constexpr (C::kImages) {
                if (p.images.kernel_w) {  // the block lies inside one tap
                    const Tap tap = tap_at(p, column);
                    const PixelBox box{tap.channel,
                                       window.column,
                                       window.row,
                                       window.image,
                                       static_cast<uint16_t>(tap.right),
                                       static_cast<uint16_t>(tap.down)};
                    if constexpr (C::kCluster > 1) {
                        load_pixels_multicast(to, x_map, box, full, (1 << C::kCluster) - 1, bytes_of(C::T));
                    } else {
                        load_pixels(to, x_map, box, full, bytes_of(C::T));
                    }
                    continue;
                }
            }
            if constexpr (C::kCluster > 1) {
                load_box_multicast(to, x_map, column, token, full, (1 << C::kCluster) - 1, bytes_of(C::T));
            } else {
                load_box(to, x_map, column, token, full, bytes_of(C::T));
            }
        }
    }
}

// Writes 64 rows of a warpgroup, whose linear part is done, part by part through its staging memory.
template <class C>
SK_DEVICE void mm_store(const Mm& p, const device::Accumulator<C::T> (&acc)[C::kTokens / 2], int row0, int token0,
                        char* staging, uint32_t thread, uint32_t barrier) {
    using namespace device;
    const int warp = thread / 32;
    const uint32_t lane = thread % 32;
    if (bytes_of(p.epilogue.out_type) == 4) {
        constexpr int kPart = C::kStagingTokens / 2;
        SK_UNROLL
        for (int begin = 0; begin < C::kTokens; begin += kPart) {
            stage_rows_wide<kPart, kBlockRows>(staging, acc + begin / 2, 16 * warp, 0, lane);
            sync_named(barrier, 128);
            store_staged<kPart, kBlockRows, 128, true>(p, staging, row0, token0 + begin, thread);
            sync_named(barrier, 128);  // the next part takes the same memory
        }
        return;
    }
    const uint32_t staging_address = shared_address(staging);
    SK_UNROLL
    for (int begin = 0; begin < C::kTokens; begin += C::kStagingTokens) {
        SK_UNROLL
        for (int j = 0; j < C::kStagingTokens / 8; j += 2) {
            uint32_t words[4];
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = 4 * (begin / 8 + j + i / 2) + 2 * (i % 2);
                words[i] = pack_output(p.epilogue.out_type, bits_as<float>(acc[at]), bits_as<float>(acc[at + 1]));
            }
            // Matrix m = lane / 8 of this store: rows 8 (m % 2) .. of the warp's 16, tokens 8 (j + m / 2) ...
            const uint32_t m = lane / 8, token = 8 * (j + m / 2) + lane % 8, chunk = 2 * warp + m % 2;
            store_matrices_transposed(staging_address + token * 128 + (chunk ^ token % 8) * 16, words);
        }
        sync_named(barrier, 128);
        store_staged<C::kStagingTokens, kBlockRows, 128, false>(p, staging, row0, token0 + begin, thread);
        sync_named(barrier, 128);
    }
}

// A block's threads in their roles: produce(shared, pieces) by one thread, consume(shared, pieces) by two warpgroups.
template <class C, class P, class Produce, class Consume>
SK_DEVICE void ring_roles(const P& p, int tiles, Produce produce, Consume consume) {
    using namespace device;
    const MmSm90Shared<C> shared(shared_memory());
    if (thread_index() == 0) {
        for (int s = 0; s < C::kStages; ++s) {
            barrier_init(shared.full + 8 * s, 1);
            barrier_init(shared.empty + 8 * s, C::kCluster * C::kWarpgroups * 4);  // every consumer warp of the cluster
        }
        fence_barrier_init();
    }
    if constexpr (C::kCluster > 1) {
        sync_cluster();
    } else {
        sync_block();
    }
    const Pieces<C::kCluster> pieces(p, tiles);
    if (thread_index() < 128) {
        keep_registers<40>();
        if (thread_index() == 0) produce(shared, pieces);
    } else {
        take_registers<232>();
        consume(shared, pieces);
    }
    if constexpr (C::kCluster > 1) sync_cluster();  // no block ends while another may still reach into it
}

// The roles of a product: tokens' slices are produced, consume(shared, pieces, row_tiles, token_tiles).
template <class C, class Consume>
SK_DEVICE void mm_roles(const device::TensorMap* x_map, const Mm& p, Consume consume) {
    const int row_tiles = (p.row_blocks * kBlockRows + C::kCluster * C::kRows - 1) / (C::kCluster * C::kRows);
    const int token_tiles = (p.m + C::kTokens - 1) / C::kTokens;
    ring_roles<C>(
        p, row_tiles * token_tiles,
        [&](const auto& shared, const auto& pieces) {
            mm_produce<C>(x_map, p, shared, pieces, row_tiles, token_tiles);
        },
        [&](const auto& shared, const auto& pieces) { consume(shared, pieces, row_tiles, token_tiles); });
}

// A consumer warp is done with a stage of the ring, which all blocks of the cluster fill.
template <class C>
SK_DEVICE void mm_release(const MmSm90Shared<C>& shared, uint32_t stage) {
    using namespace device;
    if (lane() < C::kCluster) {
        if constexpr (C::kCluster > 1) {
            barrier_arrive_at(shared.empty + 8 * stage, lane());
        } else {
            barrier_arrive(shared.empty + 8 * stage);
        }
    }
}

template <class C>
using MmSums = device::Accumulator<C::T>[C::kM][C::kTokens / 2];
template <class C>
using MmParts = device::Accumulator<C::T>[2][C::kPromotes ? C::kPartTokens / 2 : 1];

template <class C>
SK_DEVICE void mm_promote(MmSums<C>& acc, const MmParts<C>& parts, int part) {
    SK_UNROLL
    for (int i = 0; i < C::kPartTokens / 2; ++i) {
        acc[part / C::kPerRow][part % C::kPerRow * (C::kPartTokens / 2) + i] += parts[part % 2][i];
    }
}

// A block of K part by part; each is added to the sums while the next one is in flight.
template <class C>
SK_DEVICE void mm_multiply_promoted(MmSums<C>& acc, const BlockFragments<C::T> (&w)[C::kM], uint64_t b) {
    using namespace device;
    MmParts<C> parts;
    SK_UNROLL
    for (int part = 0; part < C::kParts; ++part) {
        const auto& f = w[part / C::kPerRow];
        const uint64_t at = b + part % C::kPerRow * (C::kPartTokens * 128 >> 4);
        fence_products();
        product_sp<C::T, C::kPartTokens, 0>(parts[part % 2], f.a[0], at, f.meta[0], 0);
        product_sp<C::T, C::kPartTokens, 0>(parts[part % 2], f.a[1], at + 4, f.meta[1], 1);
        commit_products();
        if (part > 0) {
            wait_products<1>();
            mm_promote<C>(acc, parts, part - 1);
        }
    }
    wait_products<0>();
    mm_promote<C>(acc, parts, C::kParts - 1);
}

template <class C>
SK_DEVICE void mm_consume(const Mm& p, const MmSm90Shared<C>& shared, Pieces<C::kCluster> pieces, int row_tiles,
                          int token_tiles) {
    using namespace device;
    constexpr Type T = C::T;
    const uint32_t thread = thread_index() % 128, group = thread_index() / 128 - 1, barrier = 1 + group;
    const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
    const uint64_t b0 = product_descriptor(shared.stages);
    RingPlace<C::kStages> place;
    MmSums<C> acc;
    BlockFragments<T> w[C::kSets][C::kM];

    const auto release = [&](uint32_t stage) { mm_release<C>(shared, stage); };

    Piece piece;
    while (pieces.take(p, piece)) {
        const Tile tile = tile_at(piece.tile, row_tiles, token_tiles);
        // Rows beyond the weight take the last block's fragments; nothing is written for them.
        const int row_block = ((tile.rows * C::kCluster + rank) * C::kWarpgroups + group) * C::kM;
        int first[C::kM];  // block of each row of blocks
        SK_UNROLL
        for (int m = 0; m < C::kM; ++m) {
            const int row = row_block + m < p.row_blocks ? row_block + m : p.row_blocks - 1;
            first[m] = row * p.k_blocks;
        }
        const auto load = [&](BlockFragments<T>(&set)[C::kM], int kb) {
            if (kb >= piece.end) return;
            SK_UNROLL
            for (int m = 0; m < C::kM; ++m) {
                load_fragments(set[m], p.fragments + int64_t{first[m] + kb} * block_bytes(T), thread);
            }
        };
        SK_UNROLL
        for (int j = 0; j < C::kAhead; ++j) load(w[j], piece.begin + j);
        if constexpr (C::kPromotes) {
            SK_UNROLL
            for (int i = 0; i < C::kM * C::kTokens / 2; ++i) acc[i / (C::kTokens / 2)][i % (C::kTokens / 2)] = 0;
        }
        SK_NO_UNROLL
        for (int kb0 = piece.begin; kb0 < piece.end; kb0 += C::kSets) {
            SK_UNROLL
            for (int j = 0; j < C::kSets; ++j) {
                const int kb = kb0 + j;
                if (kb >= piece.end) break;
                barrier_wait(shared.full + 8 * place.stage, place.phase);
                const uint64_t b = b0 + (place.stage * C::kStageBytes >> 4);
                if constexpr (C::kPromotes) {
                    load(w[(j + C::kAhead) % C::kSets], kb + C::kAhead);
                    mm_multiply_promoted<C>(acc, w[j], b);
                    release(place.stage);
                } else {
                    fence_products();
                    SK_UNROLL
                    for (int m = 0; m < C::kM; ++m) {
                        product_sp<T, C::kTokens, 0>(acc[m], w[j][m].a[0], b, w[j][m].meta[0], kb > piece.begin);
                        constexpr int kSelector = is_wide(T) ? 1 : 0;
                        product_sp<T, C::kTokens, kSelector>(acc[m], w[j][m].a[1], b + 4, w[j][m].meta[1 - kSelector],
                                                             1);
                    }
                    commit_products();
                    wait_products<1>();
                    if (kb > piece.begin) release(place.before());
                    load(w[(j + C::kAhead) % C::kSets], kb + C::kAhead);
                }
                place.next();
            }
        }
        if constexpr (!C::kPromotes) {
            wait_products<0>();
            release(place.before());
        }

        if (!add_parts<C::kM * C::kTokens / 2, 128, C::kCluster, C::kCluster * C::kWarpgroups>(
                p, piece, rank * C::kWarpgroups + group, &acc[0][0], thread, shared.flags + group, barrier)) {
            continue;
        }
        SK_UNROLL
        for (int m = 0; m < C::kM; ++m) {
            const int row0 = (row_block + m) * kBlockRows, token0 = tile.tokens * C::kTokens;
            scale_rows<C::kTokens>(p, acc[m], row0 + 16 * (thread / 32), token0, thread % 32);
            mm_store<C>(p, acc[m], row0, token0, shared.staging + group * C::kStagingBytes, thread, barrier);
        }
    }
}

template <class C>
SK_KERNEL(C::kThreads, 1)
sp24_mm_sm90(SK_PARAM device::TensorMap x_map, SK_PARAM Mm p) {
    mm_roles<C>(&x_map, p, [&](const auto& shared, const auto& pieces, int row_tiles, int token_tiles) {
        mm_consume<C>(p, shared, pieces, row_tiles, token_tiles);
    });
}

}  // namespace sk::sp24
