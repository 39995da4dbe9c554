// sp24_mm on any card since Ampere: mma.sp::ordered_metadata, cp.async pipeline.
//
// A block has kRowBlocks x kTokens / kWarpTokens warps; each computes 64 rows by kWarpTokens tokens. Per block of K a
// stage takes kRowBlocks fragment blocks as they are and the tokens' 128-byte rows with the 128-byte swizzle, so that
// fragments leave by 16-byte loads and B by ldmatrix, both without bank conflicts.
//
// Of images a thread copies the same chunk of the same windows for every block of K: it keeps where those begin, and
// one tap a block tells it how far from there the pixels lie. A piece of a copy lies inside one tap.
//
// 64 x 64 warps: for each half of a block of K 32 mma.sp (256 cycles of a sub-partition) need 2 KB of fragments and 4
// KB of B from shared memory: 4 warps ask for 96 B a cycle of 128.
#pragma once
#include "../device/mma.h"
#include "mm.cuh"

namespace sk::sp24 {

template <Type T_, int kRowBlocks_, int kTokens_, int kWarpTokens_, int kStages_>
struct MmSm80 {
    static constexpr Type T = T_;
    static constexpr int kRowBlocks = kRowBlocks_, kTokens = kTokens_, kWarpTokens = kWarpTokens_, kStages = kStages_;
    static constexpr int kRows = kRowBlocks * kBlockRows;
    static constexpr int kThreads = kRowBlocks * (kTokens / kWarpTokens) * 32;
    static constexpr int kFragmentBytes = kRowBlocks * block_bytes(T);
    static constexpr int kStageBytes = kFragmentBytes + kTokens * 128;
    static constexpr int kStagingBytes = kTokens * kRows * 4;
    static constexpr int kRingBytes = kStages * kStageBytes;
    static constexpr int kSharedBytes = (kRingBytes > kStagingBytes ? kRingBytes : kStagingBytes) + 16;
    static_assert(kFragmentBytes % 128 == 0 && kWarpTokens % 8 == 0 && kStages >= 2);
};

// The tokens' slice of a block of K, 16 bytes at a time, in pieces of the size to which the rows are aligned.
template <int kTokens, int kThreads>
SK_DEVICE void copy_tokens(const Mm& p, int bytes, uint32_t to, int token0, int kb, uint32_t thread) {
    using namespace device;
    const int64_t row_bytes = int64_t{p.k} * bytes;
    SK_UNROLL_2  // every piece in flight needs an address
        for (int i = 0; i < kTokens * 8; i += kThreads) {
        const int token = (i + thread) / 8, chunk = (i + thread) % 8;
        if (kTokens * 8 % kThreads && token >= kTokens) break;
        const uint32_t at = to + token * 128 + (chunk ^ token % 8) * 16;
        const int64_t column = int64_t{kb} * 128 + chunk * 16;
        const char* from = p.x + (token0 + token) * p.x_stride * bytes + column;
        const bool here = token0 + token < p.m;
        if (p.x_align == 16) {
            copy_async<16>(at, here && column < row_bytes ? from : p.x, here && column < row_bytes);
        } else if (p.x_align == 8) {
            for (int j = 0; j < 16; j += 8) {
                const bool valid = here && column + j < row_bytes;
                copy_async<8>(at + j, valid ? from + j : p.x, valid);
            }
        } else {
            for (int j = 0; j < 16; j += 4) {
                const bool valid = here && column + j < row_bytes;
                copy_async<4>(at + j, valid ? from + j : p.x, valid);
            }
        }
    }
}

// The same of the windows of images, 16-bit values: a thread's share of a tile.
template <int kTokens, int kThreads>
class WindowCopies {
public:
    // Beginning at the tile's first token.
    SK_DEVICE void begin(const Mm& p, int token0, uint32_t thread) {
        SK_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const int token = token0 + i * kStep + thread / 8;
            const Window w = window_at(p.images, token);
            row_[i] = token < p.m ? w.row : kNowhere;
            column_[i] = w.column;
            pixel_[i] = (w.image * p.images.height + w.row) * p.images.width + w.column;
        }
    }

    SK_DEVICE void copy(const Mm& p, uint32_t to, int kb, uint32_t thread) const {
        if (p.x_align == 16) {
            copy_pieces<16>(p, to, kb, thread);
        } else if (p.x_align == 8) {
            copy_pieces<8>(p, to, kb, thread);
        } else {
            copy_pieces<4>(p, to, kb, thread);
        }
    }

private:
    static constexpr int kStep = kThreads / 8, kCount = kTokens / kStep, kNowhere = INT32_MIN / 2;
    static_assert(kThreads % 8 == 0 && kTokens % kStep == 0 && kStep % 8 == 0);

    template <int kBytes>
    SK_DEVICE void copy_pieces(const Mm& p, uint32_t to, int kb, uint32_t thread) const {
        using namespace device;
        const uint32_t token = thread / 8, chunk = thread % 8;
        const uint32_t first = to + token * 128 + (chunk ^ token % 8) * 16;
        SK_UNROLL
        for (int j = 0; j < 16; j += kBytes) {
            const int k = kb * 64 + (chunk * 16 + j) / 2;
            const Tap tap = tap_at(p, k);
            const int shift = tap.down * p.images.width + tap.right;
            SK_UNROLL
            for (int i = 0; i < kCount; ++i) {
                const auto row = static_cast<uint32_t>(row_[i] + tap.down);
                const auto column = static_cast<uint32_t>(column_[i] + tap.right);
                const bool here = k < p.k && row < static_cast<uint32_t>(p.images.height) &&
                                  column < static_cast<uint32_t>(p.images.width);
                const char* from = p.x + (int64_t{pixel_[i] + shift} * p.x_stride + tap.channel) * 2;
                copy_async<kBytes>(first + i * kStep * 128 + j, here ? from : p.x, here);
            }
        }
    }

    int row_[kCount], column_[kCount], pixel_[kCount];  // where the windows begin; the pixel counts through all images
};

// A warp's products of one block of K: 64 rows of fragments by kTokens tokens, both in shared memory.
template <Type T, int kTokens>
SK_DEVICE void multiply_block(device::Accumulator<T> (&acc)[4][kTokens / 2], const char* fragments, uint32_t tokens,
                              uint32_t lane) {
    using namespace device;
    uint32_t meta[4][metadata_words(T)];
    SK_UNROLL
    for (int a = 0; a < 4; ++a) {
        SK_UNROLL
        for (int s = 0; s < metadata_words(T); ++s) {
            const char* at = fragments + kSteps * kStepBytes + s * 512 + (a * 32 + lane) * 4;
            meta[a][s] = *reinterpret_cast<const uint32_t*>(at);
        }
    }
    const auto step = [&]<int s>() {
        uint32_t a[4][4];
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const Vec4 v = *reinterpret_cast<const Vec4*>(fragments + s * kStepBytes + (i * 32 + lane) * 16);
            a[i][0] = v.x;
            a[i][1] = v.y;
            a[i][2] = v.z;
            a[i][3] = v.w;
        }
        SK_UNROLL
        for (int j = 0; j < kTokens / 8; ++j) {
            uint32_t b[4];
            const uint32_t chunk = 4 * s + lane / 8, row = lane % 8;
            load_matrices(b, tokens + (8 * j + row) * 128 + (chunk ^ row) * 16);
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                if constexpr (T ==
                              Type::e4m3) {  // inside of the tensor core its sums have 14 bits: not beyond one product
                    Accumulator<T> sum[4] = {};
                    mma_sp<T, 0>(sum, a[i], b, meta[i][s]);
                    SK_UNROLL
                    for (int r = 0; r < 4; ++r) acc[i][4 * j + r] += sum[r];
                } else {
                    mma_sp<T, is_wide(T) ? s : 0>(acc[i] + 4 * j, a[i], b, meta[i][is_wide(T) ? 0 : s]);
                }
            }
        }
    };
    step.template operator()<0>();
    step.template operator()<1>();
}

template <class C, bool kImages>
SK_KERNEL(C::kThreads, 1)
sp24_mm_sm80(SK_PARAM Mm p) {
    using namespace device;
    constexpr Type T = C::T;
    static_assert(!kImages || is_wide(T));
    char* memory = shared_memory();
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kSharedBytes - 16);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    const int warp_block = warp % C::kRowBlocks, warp_token = warp / C::kRowBlocks * C::kWarpTokens;
    const int row_tiles = (p.row_blocks + C::kRowBlocks - 1) / C::kRowBlocks;
    const int token_tiles = (p.m + C::kTokens - 1) / C::kTokens;
    Pieces<1> pieces(p, row_tiles * token_tiles);
    Piece piece;
    [[maybe_unused]] WindowCopies<C::kTokens, C::kThreads> windows;
    while (pieces.take(p, piece)) {
        const Tile tile = tile_at(piece.tile, row_tiles, token_tiles);
        const int token0 = tile.tokens * C::kTokens;
        if constexpr (kImages) windows.begin(p, token0, thread);
        const auto load = [&](int kb) {
            if (kb < piece.end) {
                char* stage = memory + (kb - piece.begin) % C::kStages * C::kStageBytes;
                SK_UNROLL
                for (int b = 0; b < C::kRowBlocks; ++b) {
                    // Rows beyond the weight take the last block's fragments; nothing is written for them.
                    const int row = tile.rows * C::kRowBlocks + b;
                    const int64_t block = int64_t{row < p.row_blocks ? row : p.row_blocks - 1} * p.k_blocks + kb;
                    const uint32_t to = shared_address(stage) + b * block_bytes(T);
                    SK_UNROLL
                    for (int i = 0; i < block_bytes(T); i += C::kThreads * 16) {
                        const int at = i + thread * 16;
                        if (at < block_bytes(T))
                            copy_async<16>(to + at, p.fragments + block * block_bytes(T) + at, true);
                    }
                }
                const uint32_t to = shared_address(stage + C::kFragmentBytes);
                if constexpr (kImages) {
                    windows.copy(p, to, kb, thread);
                } else {
                    copy_tokens<C::kTokens, C::kThreads>(p, bytes_of(T), to, token0, kb, thread);
                }
            }
            commit_copies();
        };
        Accumulator<T> acc[4][C::kWarpTokens / 2] = {};
        SK_UNROLL
        for (int s = 0; s < C::kStages - 1; ++s) load(piece.begin + s);
        for (int kb = piece.begin; kb < piece.end; ++kb) {
            wait_copies<C::kStages - 2>();
            sync_block();  // everybody's copies are here, and everybody is done with the stage that is loaded next
            load(kb + C::kStages - 1);
            const char* stage = memory + (kb - piece.begin) % C::kStages * C::kStageBytes;
            multiply_block<T, C::kWarpTokens>(acc, stage + warp_block * block_bytes(T),
                                              shared_address(stage + C::kFragmentBytes) + warp_token * 128, my_lane);
        }
        wait_copies<0>();
        sync_block();  // the ring becomes the staging memory

        if (!add_parts<2 * C::kWarpTokens, C::kThreads, 1, 1>(p, piece, 0, &acc[0][0], thread, flag, 1)) continue;
        const bool wide = bytes_of(p.epilogue.out_type) == 4;
        const int row0 = tile.rows * C::kRows;
        SK_UNROLL
        for (int a = 0; a < 4; ++a) {
            const int row = warp_block * kBlockRows + 16 * a;
            scale_rows<C::kWarpTokens>(p, acc[a], row0 + row, token0 + warp_token, my_lane);
            if (wide) {
                stage_rows_wide<C::kWarpTokens, C::kRows>(memory, acc[a], row, warp_token, my_lane);
                continue;
            }
            SK_UNROLL
            for (int i = 0; i < C::kWarpTokens / 4; ++i) {  // token tile i / 2, rows 8 (i % 2) ..
                const Type out = p.epilogue.out_type;
                const uint32_t pair =
                    pack_output(out, bits_as<float>(acc[a][2 * i]), bits_as<float>(acc[a][2 * i + 1]));
                const uint32_t word = transpose_matrix(pair);
                const int token = warp_token + 8 * (i / 2) + my_lane / 4, chunk = row / 8 + i % 2;
                char* to = memory + token * C::kRows * 2 + (chunk ^ token % 8) * 16 + my_lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(to) = word;
            }
        }
        sync_block();
        if (wide) {
            store_staged<C::kTokens, C::kRows, C::kThreads, true>(p, memory, row0, token0, thread);
        } else {
            store_staged<C::kTokens, C::kRows, C::kThreads, false>(p, memory, row0, token0, thread);
        }
        sync_block();  // the staging memory becomes the ring
    }
}

}  // namespace sk::sp24
