// csr_mm: Y[M, N] = epilogue(X[M, K] W[N, K]^T) over panels of X (panels.cuh says why).
//
// A subwarp of 8 lanes owns a row of W and a strip of tokens, 16 bytes of a panel's row a lane, with the sums in
// registers; kRowsPer rows one after the other for each slice of 512 columns of X, which a block keeps in shared memory
// and shares among its rows. What depends on the topology alone comes from a plan (sparsekern/_rows_cuda.py):
//   offsets  16 bits a nonzero: the byte offset of its column's row in the slice, so that an address is one addition;
//   starts   where each (row, slice) begins in the values, which are the canonical ones, read in place;
//   order    the rows of a group, sorted by length: subwarps of a warp work on rows of like length, and the rows of a
//            group stay together, so that Y leaves in runs of neighbouring columns;
//   items    (group, slices), the longest first; groups that are much longer than others, or too few for the machine,
//            are cut along K, and their parts added in order.
//
// Values and offsets are read in vectors of 4: a row begins at the multiple of 4 below its start (its reverse offset)
// and the elements of the row before are skipped; the first vector of the next row is on its way during this one.
// A step of a warp, 4 nonzeros in each of 4 rows: 16 loads of a panel's row at 1 cycle each, 8 cycles for values and
// offsets: 21 multiply-adds a cycle and SM with fp32, 42 with 16-bit types.
#pragma once
#include "../device/epilogue.h"
#include "../device/parts.h"
#include "panels.cuh"

namespace sk::csr {

// Slices [begin, end) of a group of rows; part `part` of `parts`, which begin at `slot`.
struct alignas(16) Item {
    int group, begin, end, part, parts, slot, counter, unused;
};

struct Mm {
    const char* values;
    const uint16_t* offsets;  // four more than there are values
    const int32_t* starts;    // [N * slices + 1]
    const int32_t* order;     // [groups][kRowsPer][warps][4]; -1: no row
    const Item* items;
    const char* panels;
    char* y;
    int64_t y_stride, nnz;
    int m, n, k, slices, token_tiles;
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

template <Type T_, int kRowsPer_, int kWarps_, int kStages_>
struct MmTile {
    static constexpr Type T = T_;
    static constexpr int kRowsPer = kRowsPer_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kThreads = kWarps * 32, kRows = kRowsPer * kWarps * 4;
    static constexpr int kTokens = panel_tokens(T), kPer = kTokens / kSubwarp;
    static constexpr int kSliceBytes = kTileK * kPanelBytes;
    static constexpr int kPitch = kRows + 1;  // floats from token to token while Y is put together
    static constexpr int kStagingBytes = kTokens * kPitch * 4;
    static constexpr int kMost = kStages * kSliceBytes > kStagingBytes ? kStages * kSliceBytes : kStagingBytes;
    static constexpr int kSharedBytes = (kMost + 15) / 16 * 16 + 16;
    static constexpr int kBlocks = 3 / kStages;  // an SM's: what shared memory allows
    static_assert(kRowsPer <= kSubwarp && (kStages == 1 || kStages == 2) && kSharedBytes <= 227 * 1024);
};

// Four neighbouring nonzeros.
template <Type T>
struct Four {
    uint32_t values[device::bytes_of(T)], offsets[2];

    SK_DEVICE float value(int j) const {
        if constexpr (T == Type::f32) return device::bits_as<float>(values[j]);
        if constexpr (T != Type::f32) {
            const auto bits = static_cast<uint16_t>(values[j / 2] >> (16 * (j % 2)));
            return T == Type::bf16 ? device::bf16_to_float(bits) : device::f16_to_float(bits);
        }
    }
    SK_DEVICE uint32_t offset(int j) const { return offsets[j / 2] >> (16 * (j % 2)) & 0xFFFF; }
};

struct alignas(8) Vec2 {
    uint32_t x, y;
};

// The values [i, i + 4) of `count`, i a multiple of 4; nothing is read behind the last one.
template <Type T>
SK_DEVICE void load_four(uint32_t (&out)[device::bytes_of(T)], const char* values, int64_t i, int64_t count) {
    using namespace device;
    if (i + 4 <= count) {
        if constexpr (T == Type::f32) {
            const Vec4 v = *reinterpret_cast<const Vec4*>(values + i * 4);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            const Vec2 v = *reinterpret_cast<const Vec2*>(values + i * 2);
            out[0] = v.x, out[1] = v.y;
        }
        return;
    }
    SK_UNROLL
    for (int j = 0; j < bytes_of(T); ++j) out[j] = 0;
    SK_UNROLL
    for (int j = 0; j < 3; ++j) {
        if (i + j < count) {
            if constexpr (T == Type::f32) {
                out[j] = reinterpret_cast<const uint32_t*>(values)[i + j];
            } else {
                out[j / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(values)[i + j]} << (16 * (j % 2));
            }
        }
    }
}

template <Type T, class P>
SK_DEVICE Four<T> load_nonzeros(const P& p, int i) {
    Four<T> four;
    const Vec2 o = *reinterpret_cast<const Vec2*>(p.offsets + i);
    four.offsets[0] = o.x;
    four.offsets[1] = o.y;
    load_four<T>(four.values, p.values, i, p.nnz);
    return four;
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
csr_mm(SK_PARAM Mm p) {
    using namespace device;
    constexpr Type T = C::T;
    char* memory = shared_memory();
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kSharedBytes - 16);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    const uint32_t sub = my_lane / kSubwarp, chunk = my_lane % kSubwarp;
    const int token_tile = block_x() % p.token_tiles;
    const Item item = p.items[block_x() / p.token_tiles];
    const char* panel = p.panels + int64_t{token_tile} * p.k * kPanelBytes;

    // Lane c of a subwarp keeps row c and its bounds in the slice.
    const uint32_t mine = chunk % C::kRowsPer;
    const int my_row = p.order[((item.group * C::kRowsPer + mine) * C::kWarps + warp) * 4 + sub];
    const int32_t* my_starts = p.starts + int64_t{my_row < 0 ? 0 : my_row} * p.slices;
    const auto load = [&](int slice) {
        if (slice < item.end) {
            const int row0 = slice * kTileK, rows = p.k - row0 < kTileK ? p.k - row0 : kTileK;
            copy_slice<C::kThreads>(memory + slice % C::kStages * C::kSliceBytes, panel, row0, rows, thread);
        }
        commit_copies();
    };

    float acc[C::kRowsPer][C::kPer] = {};
    int bound = item.begin < item.end ? my_starts[item.begin] : 0;
    if (C::kStages == 2) load(item.begin);
    for (int slice = item.begin; slice < item.end; ++slice) {
        load(slice + C::kStages - 1);
        const int begin = bound, end = my_row < 0 ? bound : my_starts[slice + 1];
        bound = my_starts[slice + 1];
        wait_copies<C::kStages - 1>();
        sync_block();  // everybody's copies are here
        const char* tokens = memory + slice % C::kStages * C::kSliceBytes + chunk * 16;
        int b = shuffle(begin, sub * kSubwarp), e = shuffle(end, sub * kSubwarp);
        Four<T> first{};
        if (b < e) first = load_nonzeros<T>(p, b & ~3);
        SK_UNROLL
        for (int r = 0; r < C::kRowsPer; ++r) {
            Four<T> now = first;
            const int from = b, to = e;
            if (r + 1 < C::kRowsPer) {
                b = shuffle(begin, sub * kSubwarp + r + 1);
                e = shuffle(end, sub * kSubwarp + r + 1);
                if (b < e) first = load_nonzeros<T>(p, b & ~3);
            }
            SK_NO_UNROLL
            for (int i = from & ~3; i < to; i += 4) {
                Four<T> next{};
                if (i + 4 < to) next = load_nonzeros<T>(p, i + 4);
                const auto add = [&](int j) {
                    float x[C::kPer];
                    load_tokens<T>(x, tokens + now.offset(j));
                    SK_UNROLL
                    for (int t = 0; t < C::kPer; ++t) acc[r][t] += now.value(j) * x[t];
                };
                if (i >= from && i + 4 <= to) {
                    SK_UNROLL
                    for (int j = 0; j < 4; ++j) add(j);
                } else {  // other rows' nonzeros are skipped, not multiplied by zero: X may hold infinities
                    SK_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        if (i + j >= from && i + j < to) add(j);
                    }
                }
                now = next;
            }
        }
        sync_block();  // everybody is done with the slice
    }

    if (item.parts > 1) {
        constexpr int kCount = C::kRowsPer * C::kPer;
        const auto slot = [&](int part) {
            return p.partials + (int64_t{item.slot + part} * p.token_tiles + token_tile) * kCount * C::kThreads +
                   thread;
        };
        uint32_t* counter = p.counters + int64_t{item.counter} * p.token_tiles + token_tile;
        if (!add_parts<kCount, C::kThreads>(slot, item.part, item.parts, counter, &acc[0][0], thread, flag, 0)) return;
    }
    // The slices' memory becomes [token][row].
    auto* sums = reinterpret_cast<float*>(memory);
    const int row0 = item.group * C::kRows, token0 = token_tile * C::kTokens;
    SK_UNROLL
    for (int r = 0; r < C::kRowsPer; ++r) {
        const int row = shuffle(my_row, sub * kSubwarp + r);
        if (row < 0) continue;
        SK_UNROLL
        for (int t = 0; t < C::kPer; ++t) sums[(chunk * C::kPer + t) * C::kPitch + row - row0] = acc[r][t];
    }
    sync_block();
    const int tokens = p.m - token0 < C::kTokens ? p.m - token0 : C::kTokens;
    SK_NO_UNROLL
    for (int i = thread; i < tokens * C::kRows; i += C::kThreads) {
        const int token = i / C::kRows, row = row0 + i % C::kRows;
        if (row < p.n) {
            const RowEpilogue r = row_epilogue(p.epilogue, row, true);
            const float scale = token_scale(p.epilogue, token0 + token, true);
            const float out = scale_and_shift(r, scale, sums[token * C::kPitch + row - row0]);
            store_one(p.epilogue, p.y, p.y_stride, token0 + token, row, out);
        }
    }
}

}  // namespace sk::csr
