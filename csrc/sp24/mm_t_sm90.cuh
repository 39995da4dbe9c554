// sp24_mm_t on Hopper: dX[M, K] = dY[M, N] W[N, K] with W decompressed in registers, never in memory.
//
// It is mm_sm90 with the roles of W's sides exchanged: "rows" are columns of W, blocks of K are blocks of 64 rows of W,
// and the tokens' slices are dY's. Consumers take the same 16-byte fragments, put their zeros in (permute_bytes), and
// turn the 8 x 8 matrices that result (movmatrix) into the dense A operand W^T of wgmma.
//
// A warp takes 32 columns of W, the width of a fragment, as two operands m of 16. A fragment has four columns of a
// group where an operand has two, so row 8 r + c of an operand is column 4 (c / 2) + c % 2 + 2 r of its 16; the
// epilogue turns the matrices again, so that a lane has four neighbours of a token.
//
// Per block of 64 rows of W and SM, a tile of 256 columns x 128 tokens: 16 wgmma of 64 x 128 x 16 for each warpgroup
// take 1024 cycles of the tensor cores; decompression 238 instructions for each of 8 warps, 476 cycles beside them. A
// decompressed weight that went through memory would cost 4 bytes for each of its places, written and read: a fifth of
// the time of a product with 2048 tokens.
#pragma once
#include "mm_sm90.cuh"

namespace sk::sp24 {

// Selectors of permute_bytes that put a group's pair among zeros (byte 4), by its nibble: for columns 0, 1 and for
// 2, 3. In shared memory, where the tensor cores leave time: computed they would take ten instructions of logic.
constexpr int kTableBytes = 16 * 8;

SK_DEVICE void make_table(char* table) {
    const uint32_t i = device::thread_index();
    if (i >= 16) return;
    const uint32_t selector = 0x44444444u ^ 0x54u << 8 * (i & 3) ^ 0x76u << 8 * (i >> 2);
    reinterpret_cast<uint32_t*>(table)[2 * i] = selector & 0xFFFF;
    reinterpret_cast<uint32_t*>(table)[2 * i + 1] = selector >> 16;
}

template <Type T, int kTokens, int kStages, int kCluster>
struct MmTSm90 : MmSm90<T, 2, kTokens, kStages, kCluster> {
    using Base = MmSm90<T, 2, kTokens, kStages, kCluster>;
    static constexpr int kColumns = 128;                     // of W, of a warpgroup
    static constexpr int kStagingBytes = 64 * kColumns * 2;  // 64 tokens
    static constexpr bool kImages = false;
    static constexpr int kTable = kStages * Base::kStageBytes + Base::kWarpgroups * kStagingBytes + 256;
    static constexpr int kSharedBytes = kTable + kTableBytes;
    static_assert(device::is_wide(T) && kTokens % 64 == 0 && kSharedBytes <= 227 * 1024);
};

// Of a warp's 32 columns and 16 rows of W: the pairs of lane 4 g + t, of rows g and g + 8 and groups t and 4 + t.
struct TransposedFragment {
    uint32_t values[4];
    uint32_t meta[2];  // of groups 0..3 and 4..7: row g below, row g + 8 above
};

// Operand m of the fragment. `table` is the shared address of the selectors.
SK_DEVICE void transpose_fragment(uint32_t (&a)[4], const TransposedFragment& f, int m, uint32_t t, uint32_t table) {
    using namespace device;
    const uint32_t nibbles = f.meta[m] >> 4 * t;
    SK_UNROLL
    for (int h = 0; h < 2; ++h) {  // rows g and g + 8 of W
        uint32_t selectors[2];
        load_shared_words(selectors, table + ((h ? nibbles >> 13 : nibbles << 3) & 0x78));
        a[2 * h] = transpose_matrix(permute_bytes(f.values[2 * m + h], 0, selectors[0]));
        a[2 * h + 1] = transpose_matrix(permute_bytes(f.values[2 * m + h], 0, selectors[1]));
    }
}

// 64 tokens of a warpgroup's 128 columns through its staging memory.
template <class C>
SK_DEVICE void mm_t_store(const Mm& p, const MmSums<C>& acc, int column0, int token0, int first, char* staging,
                          uint32_t thread, uint32_t barrier) {
    using namespace device;
    const uint32_t warp = thread / 32, t = thread % 4, g = thread / 4 % 8;
    SK_UNROLL
    for (int m = 0; m < 2; ++m) {
        SK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const float* d = acc[m] + 4 * (first / 8 + j);
            const uint32_t low = transpose_matrix(pack_output(C::T, d[0], d[1]));
            const uint32_t high = transpose_matrix(pack_output(C::T, d[2], d[3]));
            // Token 8 j + g, columns 32 warp + 16 m + 4 t .. + 3.
            const uint32_t token = 8 * j + g, chunk = 4 * warp + 2 * m + t / 2;
            auto* to = reinterpret_cast<uint32_t*>(staging + token * 256 + (chunk ^ token % 8) * 16 + t % 2 * 8);
            to[0] = low;
            to[1] = high;
        }
    }
    sync_named(barrier, 128);
    store_staged<64, C::kColumns, 128, false>(p, staging, column0, token0 + first, thread);
    sync_named(barrier, 128);
}

template <class C>
SK_DEVICE void mm_t_consume(const Mm& p, const MmSm90Shared<C>& shared, Pieces<C::kCluster> pieces, int column_tiles,
                            int token_tiles) {
    using namespace device;
    constexpr Type T = C::T;
    const uint32_t table = shared.stages + C::kTable;
    const uint32_t thread = thread_index() % 128, group = thread_index() / 128 - 1, barrier = 1 + group;
    const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0, warp = thread / 32, my_lane = thread % 32;
    const uint64_t b0 = product_descriptor(shared.stages);
    RingPlace<C::kStages> place;
    MmSums<C> acc;
    TransposedFragment w[4];
    uint32_t a[2][2][4];

    Piece piece;
    while (pieces.take(p, piece)) {
        const Tile tile = tile_at(piece.tile, column_tiles, token_tiles);
        const int column_block = ((tile.rows * C::kCluster + rank) * C::kWarpgroups + group) * 2;
        // Of the warp's fragments: blocks beyond the weight's columns are the last one, and nothing is written of them.
        const int mine = column_block + warp / 2 < p.row_blocks ? column_block + warp / 2 : p.row_blocks - 1;
        const uint32_t step = warp % 2;
        const int64_t stride = int64_t{p.row_blocks} * block_bytes(T);
        const char* values =
            p.fragments + piece.begin * stride + mine * block_bytes(T) + step * kStepBytes + my_lane * 16;
        const int to_meta = kSteps * kStepBytes - step * (kStepBytes - 8);  // and lanes of a row share 16 bytes
        const auto load = [&](int q) {
            const Vec4 v = load_stream(values + q * 512);
            w[q] = {{v.x, v.y, v.z, v.w}, {}};
            load_stream_words(w[q].meta, values + to_meta + q * 128 - my_lane * 16 + my_lane / 4 * 16);
        };
        SK_UNROLL
        for (int q = 0; q < 4; ++q) load(q);
        SK_NO_UNROLL
        for (int kb = piece.begin; kb < piece.end; ++kb, place.next()) {
            barrier_wait(shared.full + 8 * place.stage, place.phase);
            const uint64_t b = b0 + (place.stage * C::kStageBytes >> 4);
            // Without a branch, before which ptxas would wait for all products: the last block comes once more.
            values += kb + 1 < piece.end ? stride : 0;
            SK_UNROLL
            for (int q = 0; q < 4; ++q) {
                // One group of products stays in flight; of those before it the operands are free again.
                wait_products<1>();
                if (q == 1 && kb > piece.begin) mm_release<C>(shared, place.before());
                SK_UNROLL
                for (int m = 0; m < 2; ++m) transpose_fragment(a[q % 2][m], w[q], m, my_lane % 4, table);
                load(q);
                fence_products();
                SK_UNROLL
                for (int m = 0; m < 2; ++m) {
                    product<T, C::kTokens>(acc[m], a[q % 2][m], b + 2 * q, q > 0 || kb > piece.begin);
                }
                commit_products();
            }
        }
        wait_products<0>();
        mm_release<C>(shared, place.before());

        if (!add_parts<C::kM * C::kTokens / 2, 128, C::kCluster, C::kCluster * C::kWarpgroups>(
                p, piece, rank * C::kWarpgroups + group, &acc[0][0], thread, shared.flags + group, barrier)) {
            continue;
        }
        SK_UNROLL
        for (int first = 0; first < C::kTokens; first += 64) {
            mm_t_store<C>(p, acc, column_block * kBlockRows, tile.tokens * C::kTokens, first,
                          shared.staging + group * C::kStagingBytes, thread, barrier);
        }
    }
}

template <class C>
SK_KERNEL(C::kThreads, 1)
sp24_mm_t_sm90(SK_PARAM device::TensorMap dy_map, SK_PARAM Mm p) {
    make_table(device::shared_memory() + C::kTable);  // before the barrier of mm_roles
    mm_roles<C>(&dy_map, p, [&](const auto& shared, const auto& pieces, int column_tiles, int token_tiles) {
        mm_t_consume<C>(p, shared, pieces, column_tiles, token_tiles);
    });
}

}  // namespace sk::sp24
