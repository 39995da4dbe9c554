// csr_sddmm: dW[j] = sum over tokens m of dY[m, n_j] X[m, k_j], at the stored positions, over panels of both.
//
// A block takes a group of rows and a slice of 512 columns of X, and walks the strips of tokens (a share of them where
// groups and slices are too few for the machine). For each strip the slice lies in shared memory; a subwarp of 8 lanes
// keeps its row's 128 bytes of dY in registers, 16 a lane, and multiplies them with the panel's row of every nonzero.
// Eight sums at a time are added across the eight lanes in 7 exchanges, after which lane j has the sum of nonzero j: it
// alone adds it to the running sum in memory, so nothing needs an atomic and results do not depend on any order.
// 8 nonzeros in each of 4 rows: 32 loads of 1 cycle, 7 exchanges, 2 accesses of the running sums.
#pragma once
#include "mm.cuh"

namespace sk::csr {

struct Sddmm {
    const uint16_t* offsets;
    const int32_t *starts, *order;
    const char *x_panels, *dy_panels;
    float* sums;  // [splits, nnz]; `out` itself where that is fp32 and there is one split
    char* out;    // [nnz], written where there is one split
    int64_t nnz;
    int n, k, slices, token_tiles, splits;
    Type out_type;
};

template <Type T_, int kRowsPer_, int kWarps_, int kStages_>
struct SddmmTile {
    static constexpr Type T = T_;
    static constexpr int kRowsPer = kRowsPer_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kThreads = kWarps * 32, kRows = kRowsPer * kWarps * 4;
    static constexpr int kPer = panel_tokens(T) / kSubwarp;
    static constexpr int kSliceBytes = kTileK * kPanelBytes, kSharedBytes = kStages * kSliceBytes;
    static constexpr int kBlocks = 3 / kStages;  // an SM's: what shared memory allows
    static_assert(kRowsPer <= kSubwarp && (kStages == 1 || kStages == 2));
};

// After it lane c of each subwarp has the sum of the eight lanes' sums[c] in sums[0].
SK_DEVICE void add_across(float (&sums)[kSubwarp], uint32_t chunk) {
    SK_UNROLL
    for (int half = kSubwarp / 2; half; half /= 2) {
        const bool upper = chunk & half;
        SK_UNROLL
        for (int j = 0; j < half; ++j) {
            const float give = upper ? sums[j] : sums[j + half], keep = upper ? sums[j + half] : sums[j];
            sums[j] = keep + device::shuffle_xor(give, half);
        }
    }
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
csr_sddmm(SK_PARAM Sddmm p) {
    using namespace device;
    constexpr Type T = C::T;
    char* memory = shared_memory();
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    const uint32_t sub = my_lane / kSubwarp, chunk = my_lane % kSubwarp;
    const int split = block_x() % p.splits, rest = block_x() / p.splits;
    const int slice = rest % p.slices, group = rest / p.slices;
    const int first = static_cast<int>(int64_t{split} * p.token_tiles / p.splits);
    const int last = static_cast<int>(int64_t{split + 1} * p.token_tiles / p.splits);
    const int k0 = slice * kTileK, k_rows = p.k - k0 < kTileK ? p.k - k0 : kTileK;
    float* sums = p.sums + int64_t{split} * p.nnz;

    const uint32_t mine = chunk % C::kRowsPer;
    const int my_row = p.order[((group * C::kRowsPer + mine) * C::kWarps + warp) * 4 + sub];
    int my_begin = 0, my_end = 0;
    if (my_row >= 0) {
        my_begin = p.starts[int64_t{my_row} * p.slices + slice];
        my_end = p.starts[int64_t{my_row} * p.slices + slice + 1];
    }
    const auto load = [&](int tile) {
        if (tile < last) {
            const char* panel = p.x_panels + int64_t{tile} * p.k * kPanelBytes;
            copy_slice<C::kThreads>(memory + tile % C::kStages * C::kSliceBytes, panel, k0, k_rows, thread);
        }
        commit_copies();
    };
    if (C::kStages == 2) load(first);
    for (int tile = first; tile < last; ++tile) {
        load(tile + C::kStages - 1);
        wait_copies<C::kStages - 1>();
        sync_block();  // everybody's copies are here
        const char* tokens = memory + tile % C::kStages * C::kSliceBytes + chunk * 16;
        const char* dy_panel = p.dy_panels + int64_t{tile} * p.n * kPanelBytes;
        SK_NO_UNROLL
        for (int r = 0; r < C::kRowsPer; ++r) {
            const int row = shuffle(my_row, sub * kSubwarp + r);
            const int from = shuffle(my_begin, sub * kSubwarp + r), to = shuffle(my_end, sub * kSubwarp + r);
            // As many steps as the longest of the warp's rows has: lanes exchange their sums.
            int steps = from < to ? (to - (from & ~7) + 7) / 8 : 0;
            SK_UNROLL
            for (uint32_t mask = kSubwarp; mask < 32; mask *= 2) {
                const int other = shuffle_xor(steps, mask);
                steps = other > steps ? other : steps;
            }
            float dy[C::kPer] = {};
            if (from < to) load_tokens<T>(dy, dy_panel + int64_t{row} * kPanelBytes + chunk * 16);
            SK_NO_UNROLL
            for (int step = 0; step < steps; ++step) {
                const int i = (from & ~7) + 8 * step;
                float sum[kSubwarp] = {};
                if (i < to) {
                    const Vec4 o = *reinterpret_cast<const Vec4*>(p.offsets + i);
                    const uint32_t offsets[4] = {o.x, o.y, o.z, o.w};
                    SK_UNROLL
                    for (int j = 0; j < kSubwarp; ++j) {
                        if (i + j < from || i + j >= to) continue;
                        float x[C::kPer];
                        load_tokens<T>(x, tokens + (offsets[j / 2] >> (16 * (j % 2)) & 0xFFFF));
                        SK_UNROLL
                        for (int t = 0; t < C::kPer; ++t) sum[j] += dy[t] * x[t];
                    }
                }
                add_across(sum, chunk);
                const int at = i + static_cast<int>(chunk);
                if (at >= from && at < to) {
                    const float total = tile == first ? sum[0] : sums[at] + sum[0];
                    if (p.splits > 1 || tile + 1 < last || p.out_type == Type::f32) {
                        sums[at] = total;
                    } else {
                        reinterpret_cast<uint16_t*>(p.out)[at] =
                            static_cast<uint16_t>(pack_output(p.out_type, total, 0));
                    }
                }
            }
        }
        sync_block();  // everybody is done with the slice
    }
    wait_copies<0>();
}

}  // namespace sk::csr
