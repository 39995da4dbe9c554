// Between a bitmap's values and a dense matrix, bound by the dense bytes: for many tokens, where dense tensor cores are
// faster than any skipping of half of the weights, and for gradients.
#pragma once
#include "../device/copy.h"

namespace sk::bitmap {

struct Expand {
    char* values;
    const uint8_t* bits;     // [N, bit_bytes]
    const int64_t* offsets;  // [N + 1]
    char* dense;             // [N, K]
    int n, k, bit_bytes;
};

constexpr int kExpandThreads = 256;

// A warp takes a row, 256 columns at once, a byte of bits a lane. kToDense: dense = values at the bits, 0 elsewhere;
// otherwise values = dense at the bits.
template <class Element, bool kToDense>
SK_KERNEL(kExpandThreads, 4)
bitmap_expand(SK_PARAM Expand p) {
    using namespace device;
    const uint32_t my_lane = lane();
    const int row = block_x() * (kExpandThreads / 32) + warp_index();
    if (row >= p.n) return;
    auto* values = reinterpret_cast<Element*>(p.values) + p.offsets[row];
    auto* dense = reinterpret_cast<Element*>(p.dense) + int64_t{row} * p.k;
    const uint8_t* bits = p.bits + int64_t{row} * p.bit_bytes;
    for (int byte = my_lane; byte - static_cast<int>(my_lane) < p.bit_bytes; byte += 32) {
        const uint32_t mine = byte < p.bit_bytes ? bits[byte] : 0;
        const uint32_t own = count_bits(mine);
        uint32_t sum = own;
        SK_UNROLL
        for (uint32_t d = 1; d < 32; d *= 2) {
            const uint32_t lower = shuffle(sum, my_lane - d);
            if (my_lane >= d) sum += lower;
        }
        Element* from = values + (sum - own);
        values += shuffle(sum, 31);
        Element out[8] = {};
        SK_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (!(mine >> j & 1)) continue;
            if constexpr (kToDense) {
                out[j] = *from++;
            } else {
                *from++ = dense[byte * 8 + j];
            }
        }
        if constexpr (kToDense) {
            Element* to = dense + byte * 8;
            if (byte * 8 + 8 <= p.k && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
                Vec4 words[sizeof(Element) / 2];
                memcpy(words, out, sizeof(out));
                SK_UNROLL
                for (int i = 0; i < static_cast<int>(sizeof(Element) / 2); ++i)
                    reinterpret_cast<Vec4*>(to)[i] = words[i];
            } else {
                SK_UNROLL
                for (int j = 0; j < 8; ++j) {
                    if (byte * 8 + j < p.k) to[j] = out[j];
                }
            }
        }
    }
}

}  // namespace sk::bitmap
