// Fragment order: a 2:4 weight as the tensor cores take it, so that a thread's operand is one 16-byte load.
//
// W is cut into blocks of 64 rows x 128 bytes of K (64 elements of 16 bits, 128 of 8); a row of blocks is contiguous
// along K. In a block, for step s = 0, 1 (half of its K) and thread i = 0..127, which is lane i % 32 of warp i / 32:
//   values    16 bytes at s * 2048 + i * 16: the registers of mma.sp's and wgmma.sp's A operand, rows 16 (i / 32) ..;
//   metadata  16-bit types: 4 bytes at 4096 + i * 4, step 0 in lanes t = 0, 1 and step 1 in lanes t = 2, 3, so that one
//             register serves both steps through the instruction's selector;
//             8-bit types: 4 bytes at 4096 + s * 512 + i * 4.
// 4608 or 5120 bytes a block, 9/16 or 10/16 of dense; rows and columns beyond the matrix hold zeros and legal metadata.
// mma.sp and wgmma.sp share it: a warp of a wgmma takes exactly the operand that mma.sp takes.
#pragma once
#include "../device/copy.h"

namespace sk::sp24 {

using device::Type;
using device::Vec4;

constexpr int kBlockRows = 64;
constexpr int kSteps = 2;
constexpr int kStepBytes = 2048;

SK_BOTH constexpr int block_k(Type t) { return 128 / device::bytes_of(t); }
SK_BOTH constexpr int block_bytes(Type t) { return device::is_wide(t) ? 4608 : 5120; }
SK_BOTH constexpr int metadata_words(Type t) { return device::is_wide(t) ? 1 : 2; }

// One thread's share of a block.
template <Type T>
struct BlockFragments {
    uint32_t a[kSteps][4];
    uint32_t meta[metadata_words(T)];
};

// `block` points to the block, `i` is the thread's place in its group of 128.
template <Type T>
SK_DEVICE void load_fragments(BlockFragments<T>& f, const char* block, uint32_t i) {
    SK_UNROLL
    for (int s = 0; s < kSteps; ++s) {
        const Vec4 v = device::load_stream(block + s * kStepBytes + i * 16);
        f.a[s][0] = v.x;
        f.a[s][1] = v.y;
        f.a[s][2] = v.z;
        f.a[s][3] = v.w;
    }
    SK_UNROLL
    for (int s = 0; s < metadata_words(T); ++s) {
        f.meta[s] = device::load_stream_word(block + kSteps * kStepBytes + s * 512 + i * 4);
    }
}

}  // namespace sk::sp24
