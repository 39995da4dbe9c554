// sp24_mm for few tokens (M <= 64): bound by the weight's bytes, so everything serves one contiguous stream of them.
//
// The blocks of fragments lie in memory in the order (row block, K). The workers (thread blocks) take equal shares of
// that stream, whatever rows they cut through; in a worker the warps take its blocks in turn. A warp keeps kStages - 1
// blocks and the tokens' slices that go with them on their way by cp.async, across the ends of rows, without ever
// waiting for another warp. At the end of a row block the warps' sums are added in their order, and the parts of
// several workers by add_parts: deterministic, no second launch, no plan.
//
// In flight: kWarps * (kStages - 1) * 4.6 KB, 110 KB at 8 warps and 4 stages; the products (one mma.sp for 16 rows, 8
// tokens and half a block) are idle most of the time.
#pragma once
#include "mm_sm80.cuh"

namespace sk::sp24 {

template <Type T_, int kTokens_, int kWarps_, int kStages_>
struct Decode {
    static constexpr Type T = T_;
    static constexpr int kTokens = kTokens_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kStageBytes = block_bytes(T) + kTokens * 128;
    static constexpr int kPitch = kBlockRows + 4;  // floats from token to token of the sums: no bank conflicts
    static constexpr int kSumBytes = kWarps * kTokens * kPitch * 4;
    static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
    static constexpr int kSharedBytes = kRingBytes + kSumBytes + 16;
    static constexpr int kCount = kTokens * kBlockRows / kThreads;
    static_assert(kTokens * kBlockRows % kThreads == 0 && kStages >= 2 && block_bytes(T) % 512 == 0);
    static_assert(kSharedBytes <= 227 * 1024);
};

template <class C>
SK_KERNEL(C::kThreads, 1)
sp24_decode(SK_PARAM Mm p) {
    using namespace device;
    if constexpr (C::kSharedBytes > kMostShared) return unreachable();
    constexpr Type T = C::T;
    char* memory = shared_memory();
    auto* sums = reinterpret_cast<Accumulator<T>*>(memory + C::kRingBytes);
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kRingBytes + C::kSumBytes);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    char* ring = memory + warp * C::kStages * C::kStageBytes;

    // This worker's stream of blocks, and this warp's place in it.
    Pieces<1> pieces(p, p.row_blocks);
    const int begin = pieces.begin_of(p, pieces.worker()), end = pieces.begin_of(p, pieces.worker() + 1);
    int ahead = begin + warp;
    int into = 0, from = 0;  // stages
    const auto load = [&] {
        if (ahead < end) {
            const uint32_t to = shared_address(ring + into * C::kStageBytes);
            SK_UNROLL
            for (int i = 0; i < block_bytes(T); i += 512) {
                copy_async<16>(to + i + my_lane * 16, p.fragments + int64_t{ahead} * block_bytes(T) + i + my_lane * 16,
                               true);
            }
            copy_tokens<C::kTokens, 32>(p, bytes_of(T), to + block_bytes(T), 0, ahead % p.k_blocks, my_lane);
        }
        commit_copies();
        ahead += C::kWarps;
        into = into + 1 == C::kStages ? 0 : into + 1;
    };
    SK_UNROLL
    for (int s = 0; s < C::kStages - 1; ++s) load();

    int mine = begin + warp;
    Piece piece;
    while (pieces.take(p, piece)) {
        const int stop = piece.tile * p.k_blocks + piece.end;
        Accumulator<T> acc[4][C::kTokens / 2] = {};
        for (; mine < stop; mine += C::kWarps) {
            wait_copies<C::kStages - 2>();
            sync_warp();  // every lane's copies are here, and every lane is done with the stage that is loaded next
            load();
            const char* stage = ring + from * C::kStageBytes;
            multiply_block<T, C::kTokens>(acc, stage, shared_address(stage + block_bytes(T)), my_lane);
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
        Accumulator<T> sum[C::kCount];
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) {
            const int at = i * C::kThreads + thread, token = at / kBlockRows, row = at % kBlockRows;
            sum[i] = 0;
            SK_UNROLL
            for (int w = 0; w < C::kWarps; ++w) sum[i] += sums[(w * C::kTokens + token) * C::kPitch + row];
        }
        sync_block();  // the next piece's sums may come
        if (!add_parts<C::kCount, C::kThreads, 1, 1>(p, piece, 0, sum, thread, flag, 1)) continue;
        const int row = piece.tile * kBlockRows + thread % kBlockRows;
        const Epilogue& e = p.epilogue;
        const RowEpilogue r = row_epilogue(e, row, row < p.n);
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) {
            const int token = (i * C::kThreads + thread) / kBlockRows;
            if (row >= p.n || token >= p.m) continue;
            const auto out = e.out_type == Type::i32 ? sum[i] : scale_and_shift(r, token_scale(e, token, true), sum[i]);
            store_one(e, p.y, p.y_stride, token, row, out);
        }
    }
    wait_copies<0>();
}

}  // namespace sk::sp24
