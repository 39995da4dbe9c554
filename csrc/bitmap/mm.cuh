// bitmap_mm for few tokens (M <= 64): a weight with half of its values stored costs 1.125 bytes instead of 2.
//
// The records of the tiles lie in memory in the order (row block, K). The workers (thread blocks) take equal shares of
// the tiles, whatever rows they cut through; in a worker the warps take tiles in turn. A warp keeps kStages - 1 records
// and the tokens' slices that go with them on their way by cp.async, and decodes them from shared memory straight into
// the registers of mma.m16n8k16. A stage has room for the longest record of this very weight. At the end of a row block
// the warps' sums are added in their order, and the parts of several workers by add_parts.
//
// 1024 weights cost about 32 loads of 2 bytes, 12 exchanges and 150 other instructions of a warp: some 70 cycles of an
// SM; at density 0.5 the memory of an H100 needs 77 cycles for them, at 0.3 it needs 50. One token costs what eight do:
// the rest of its slice is filled with zeros that are not read.
#pragma once
#include "../device/epilogue.h"
#include "../device/mma.h"
#include "../device/parts.h"
#include "fragments.cuh"

namespace sk::bitmap {

struct Mm {
    const char* records;
    const int32_t* offsets;  // [row blocks * k blocks + 1], in 16 bytes
    const char* x;
    char* y;
    int64_t x_stride, y_stride;  // elements from token to token
    int m, n, k;
    int row_blocks, k_blocks;
    int streamed;     // all rows of blocks: see device/parts.h
    int x_align;      // 16, 8 or 4: bytes that divide every row's address and length
    int stage_bytes;  // tokens and the longest record
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

template <Type T_, int kTokens_, int kWarps_, int kStages_>
struct MmTile {
    static constexpr Type T = T_;
    static constexpr int kTokens = kTokens_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kTokenBytes = kTokens * kTileColumns * 2;
    static constexpr int kPitch = kTileRows + 4;  // floats from token to token of the sums: no bank conflicts
    static constexpr int kSumBytes = kWarps * kTokens * kPitch * 4 + 16;
    static constexpr int kCount = kTokens * kTileRows / kThreads;
    static constexpr int kBlocks = kTokens <= 16 ? 2 : 1;
    static constexpr int shared_bytes(int record) { return kSumBytes + kWarps * kStages * (kTokenBytes + record); }
    static_assert(kTokens * kTileRows % kThreads == 0 && kStages >= 2);
};

// 32 columns of the tokens, 64 bytes each; 16-byte chunk c of token t lies at c ^ t / 2 % 4: ldmatrix meets no
// conflict.
template <int kTokens>
SK_DEVICE void copy_tokens(const Mm& p, uint32_t to, int kb, uint32_t lane) {
    using namespace device;
    SK_UNROLL
    for (int i = 0; i < kTokens * 4; i += 32) {
        const int token = (i + lane) / 4, chunk = (i + lane) % 4, column = kb * kTileColumns + chunk * 8;
        const uint32_t at = to + token * 64 + (chunk ^ (token / 2 % 4)) * 16;
        const char* from = p.x + (token * p.x_stride + column) * 2;
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
    }
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
bitmap_mm(SK_PARAM Mm p) {
    using namespace device;
    constexpr Type T = C::T;
    char* memory = shared_memory();
    auto* sums = reinterpret_cast<float*>(memory);
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kSumBytes - 16);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    char* ring = memory + C::kSumBytes + warp * C::kStages * p.stage_bytes;

    Pieces<1> pieces(p, p.row_blocks);
    const int begin = pieces.begin_of(p, pieces.worker()), end = pieces.begin_of(p, pieces.worker() + 1);
    int ahead = begin + warp;
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
            const uint32_t to = shared_address(ring + into * p.stage_bytes);
            copy_tokens<C::kTokens>(p, to, ahead % p.k_blocks, my_lane);
            const char* record = p.records + int64_t{first} * kUnit;
            const int bytes = (last - first) * kUnit;
            SK_NO_UNROLL
            for (int i = my_lane * 16; i < bytes; i += 512) {
                copy_async<16>(to + C::kTokenBytes + i, record + i, true);
            }
        }
        commit_copies();
        ahead += C::kWarps;
        look();
        into = into + 1 == C::kStages ? 0 : into + 1;
    };
    SK_UNROLL
    for (int s = 0; s < C::kStages - 1; ++s) load();

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
            const char* stage = ring + from * p.stage_bytes;
            const char* record = stage + C::kTokenBytes;
            uint32_t b[C::kTokens / 8][4];
            SK_UNROLL
            for (int j = 0; j < C::kTokens / 8; ++j) {
                const uint32_t token = 8 * j + my_lane % 8, chunk = my_lane / 8;
                load_matrices(b[j], shared_address(stage) + token * 64 + (chunk ^ (token / 2 % 4)) * 16);
            }
            const auto* values = reinterpret_cast<const uint16_t*>(record + kBitBytes);
            SK_UNROLL
            for (int s = 0; s < kSteps; ++s) {
                const uint32_t bits = reinterpret_cast<const uint32_t*>(record)[32 * s + my_lane];
                const Places where = places(bits, my_lane);
                SK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    uint32_t a[4];
                    decode(a, bits, where, i, values);
                    SK_UNROLL
                    for (int j = 0; j < C::kTokens / 8; ++j) {
                        const uint32_t half[2] = {b[j][2 * s], b[j][2 * s + 1]};
                        mma<T>(acc[i] + 4 * j, a, half);
                    }
                }
            }
            from = from + 1 == C::kStages ? 0 : from + 1;
        }
        // The warps' sums, [token][row].
        SK_UNROLL
        for (int i = 0; i < 2 * C::kTokens; ++i) {
            const int a = i / (C::kTokens / 2), j = i % (C::kTokens / 2);
            const int row = 16 * a + my_lane / 4 + j % 4 / 2 * 8, token = 8 * (j / 4) + 2 * (my_lane % 4) + j % 2;
            sums[(warp * C::kTokens + token) * C::kPitch + row] = acc[a][j];
        }
        sync_block();
        float sum[C::kCount];
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) {
            const int at = i * C::kThreads + thread, token = at / kTileRows, row = at % kTileRows;
            sum[i] = 0;
            SK_UNROLL
            for (int w = 0; w < C::kWarps; ++w) sum[i] += sums[(w * C::kTokens + token) * C::kPitch + row];
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
        for (int i = 0; i < C::kCount; ++i) {
            const int at = i * C::kThreads + thread;
            sums[at / kTileRows * C::kPitch + at % kTileRows] = sum[i];
        }
        // Each thread takes what it has put there itself.
        const int row = piece.tile * kTileRows + thread % kTileRows;
        const RowEpilogue r = row_epilogue(p.epilogue, row, row < p.n);
        SK_NO_UNROLL
        for (int token = thread / kTileRows; token < p.m; token += C::kThreads / kTileRows) {
            const float out = scale_and_shift(r, 1.0f, sums[token * C::kPitch + thread % kTileRows]);
            if (row < p.n) store_one(p.epilogue, p.y, p.y_stride, token, row, out);
        }
        sync_block();  // the next piece's sums may come
    }
    wait_copies<0>();
}

}  // namespace sk::bitmap
