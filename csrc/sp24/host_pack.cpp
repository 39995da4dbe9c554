// Dense <-> sp24, and what is derived from the metadata.
#include "../core/compress.h"
#include "../core/expand.h"
#include "../core/parallel.h"
#include "host.h"
#include "host_parts.h"

SK_ISA_BEGIN
namespace {

// For two groups at once: their nonzero bits -> the bits of the stored pairs, and the metadata. A group is filled up
// with its last zeros.
struct PackTable {
    uint8_t keep[256], meta[256];
    bool crowded[256];
};
constexpr PackTable kPack = [] {
    PackTable t{};
    for (int mask = 0; mask < 256; ++mask) {
        for (int g = 0; g < 2; ++g) {
            int bits = mask >> 4 * g & 15, pair[2] = {0, 0}, found = 0;
            if (__builtin_popcount(bits) > 2) t.crowded[mask] = true;
            for (int i = 3; i >= 0 && __builtin_popcount(bits) < 2; --i) bits |= 1 << i;
            for (int i = 0; i < 4 && found < 2; ++i)
                if (bits >> i & 1) pair[found++] = i;
            t.keep[mask] |= uint8_t((1 << pair[0] | 1 << pair[1]) << 4 * g);
            t.meta[mask] |= uint8_t((pair[0] | pair[1] << 2) << 4 * g);
        }
    }
    return t;
}();

// Of 16 elements (4 groups) the two largest of every group.
template <Dtype T>
inline uint32_t largest(const void* p, int count) {
#if SK_LEVEL >= SK_AVX512
    const __m512i a = magnitudes<T>(load_step<T>(p, count));
    // Each element against its three neighbours; on a tie the one before it wins.
    auto beaten = [&](__m512i b, __mmask16 before) {
        return __mmask16(_mm512_cmpgt_epu32_mask(b, a) | _mm512_mask_cmpeq_epu32_mask(before, b, a));
    };
    const __mmask16 b1 = beaten(_mm512_shuffle_epi32(a, _MM_PERM_ADCB), 0x8888);
    const __mmask16 b2 = beaten(_mm512_shuffle_epi32(a, _MM_PERM_BADC), 0xcccc);
    const __mmask16 b3 = beaten(_mm512_shuffle_epi32(a, _MM_PERM_CBAD), 0xeeee);
    return uint16_t(~((b1 & b2) | (b1 & b3) | (b2 & b3)));
#else
    uint32_t keep = 0;
    for (int g = 0; g < kStep; g += 4) {
        uint32_t a[4];
        for (int i = 0; i < 4; ++i) a[i] = g + i < count ? magnitude<T>(p, g + i) : 0;
        for (int i = 0; i < 4; ++i) {
            int beaten = 0;
            for (int j = 0; j < 4; ++j) beaten += j < i ? a[j] >= a[i] : a[j] > a[i];
            keep |= uint32_t(beaten < 2) << (g + i);
        }
    }
    return keep;
#endif
}

// One row; returns the first group with more than two nonzeros, or -1.
template <Dtype T, bool Top2>
int64_t pack_row(const char* row, int64_t k, char* values, uint8_t* meta) {
    constexpr int64_t kSize = size_of(T);
    int64_t crowded = -1;
    for (int64_t i = 0; i < k; i += kStep) {
        const char* p = row + i * kSize;
        const int count = k - i < kStep ? int(k - i) : kStep;
        uint32_t mask = nonzeros<T>(p, count);
        if (Top2) mask &= largest<T>(p, count);
        const int low = mask & 255, high = mask >> 8;
        if (!Top2 && (kPack.crowded[low] || kPack.crowded[high]) && crowded < 0) {
            crowded = i / 4;
            while (__builtin_popcount(mask >> (crowded * 4 - i) & 15) <= 2) ++crowded;
        }
        uint32_t keep = kPack.keep[low];
        *meta++ = kPack.meta[low];
        if (count > 8) {
            keep |= uint32_t(kPack.keep[high]) << 8;
            *meta++ = kPack.meta[high];
        }
        char* to = values + i / 2 * kSize;
        if (count == kStep) {
#if SK_LEVEL < SK_AVX512
            for (int g = 0; g < 4; ++g) {
                const int bits = keep >> 4 * g & 15;
                const int first = __builtin_ctz(bits), second = 31 - __builtin_clz(bits);
                __builtin_memcpy(to + 2 * g * kSize, p + (4 * g + first) * kSize, kSize);
                __builtin_memcpy(to + (2 * g + 1) * kSize, p + (4 * g + second) * kSize, kSize);
            }
#else
            compress<T>(p, keep, to, kStep);
#endif
        } else {  // stored positions may lie beyond the row
            alignas(64) char whole[kStep * kSize] = {};
            __builtin_memcpy(whole, p, size_t(count * kSize));
            compress<T>(whole, keep, to, kStep);
        }
    }
    return crowded;
}

template <bool Top2>
int64_t pack(const Dense& w, void* values, uint8_t* meta, int threads) {
    const int64_t bytes = (w.cols + 7) / 8, groups = bytes * 2, size = size_of(w.dtype);
    const int64_t step = bytes ? (int64_t(1) << 15) / bytes + 1 : 1;
    int64_t first = INT64_MAX;  // of all tasks
    if (bytes == 0) return -1;
    if (w.rows * w.cols < (1 << 17)) threads = 1;
    parallel_for((w.rows + step - 1) / step, threads, [&](int64_t task) {
        dispatch_any(w.dtype, [&]<Dtype T>() {
            for (int64_t r = task * step; r < w.rows && r < (task + 1) * step; ++r) {
                const char* row = static_cast<const char*>(w.data) + r * w.ld * size;
                char* to = static_cast<char*>(values) + r * bytes * 4 * size;
                const int64_t crowded = pack_row<T, Top2>(row, w.cols, to, meta + r * bytes);
                if (crowded < 0) continue;
                const int64_t at = r * groups + crowded;
                int64_t known = __atomic_load_n(&first, __ATOMIC_RELAXED);
                while (at < known &&
                       !__atomic_compare_exchange_n(&first, &known, at, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                }
                return;
            }
        });
    });
    return first == INT64_MAX ? -1 : first;
}

}  // namespace

int64_t sp24_pack(const Dense& w, void* values, uint8_t* meta, int threads) {
    return pack<false>(w, values, meta, threads);
}

void sp24_pack_top2(const Dense& w, void* values, uint8_t* meta, int threads) { pack<true>(w, values, meta, threads); }

void sp24_unpack(const Sp24& w, void* dense, int threads) {
    const int64_t bytes = (w.k + 7) / 8, step = bytes ? (int64_t(1) << 15) / bytes + 1 : 1;
    if (bytes == 0) return;
    if (w.n * w.k < (1 << 17)) threads = 1;
    parallel_for((w.n + step - 1) / step, threads, [&](int64_t task) {
        dispatch_any(w.dtype, [&]<Dtype T>() {
            constexpr int64_t kSize = size_of(T);
            for (int64_t r = task * step; r < w.n && r < (task + 1) * step; ++r) {
                const char* from = static_cast<const char*>(w.values) + r * bytes * 4 * kSize;
                char* row = static_cast<char*>(dense) + r * w.k * kSize;
                const uint8_t* meta = w.meta + r * bytes;
                alignas(64) uint8_t masks[64];
                for (int64_t b = 0; b < bytes; b += 64) {
                    const int64_t some = bytes - b < 64 ? bytes - b : 64;
                    sp24_masks(meta + b, some, masks);
                    for (int64_t i = 0; i < some; i += 2) {
                        const int64_t k = (b + i) * 8;
                        const int count = w.k - k < kStep ? int(w.k - k) : kStep;
                        uint32_t mask = uint32_t(masks[i]) | (i + 1 < some ? uint32_t(masks[i + 1]) << 8 : 0);
                        mask &= (1u << count) - 1;  // padding is stored last, so dropping it moves nothing
                        spread<T>(from + (b + i) * 4 * kSize, mask, row + k * kSize, count);
                    }
                }
            }
        });
    });
}

void sp24_columns(const uint8_t* meta, int64_t n, int64_t k, int32_t* col, int threads) {
    const int64_t bytes = (k + 7) / 8, step = bytes ? (int64_t(1) << 15) / bytes + 1 : 1;
    if (bytes == 0) return;
    if (n * k < (1 << 17)) threads = 1;
    parallel_for((n + step - 1) / step, threads, [&](int64_t task) {
        for (int64_t r = task * step; r < n && r < (task + 1) * step; ++r) {
            const uint8_t* m = meta + r * bytes;
            int32_t* to = col + r * bytes * 4;
            for (int64_t b = 0; b < bytes; ++b, to += 4) {
                const int32_t at = int32_t(b * 8);
                to[0] = at + (m[b] & 3);
                to[1] = at + (m[b] >> 2 & 3);
                to[2] = at + 4 + (m[b] >> 4 & 3);
                to[3] = at + 4 + (m[b] >> 6);
            }
        }
    });
}

int64_t sp24_check(const uint8_t* meta, int64_t bytes) {
    // nibble -> is it one of 4 8 9 C D E
    constexpr auto legal = [](int nibble) { return (nibble & 3) < (nibble >> 2); };
    int64_t i = 0;
#if SK_LEVEL >= SK_AVX2
    // A nibble is legal where its high pair exceeds its low pair: compare the pairs, moved to the same place.
    const __m256i pair = _mm256_set1_epi8(3);
    auto pairs = [&](__m256i v, int shift) { return _mm256_and_si256(_mm256_srli_epi16(v, shift), pair); };
    for (; i + 32 <= bytes; i += 32) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(meta + i));
        const __m256i even = _mm256_cmpgt_epi8(pairs(v, 2), pairs(v, 0));
        const __m256i odd = _mm256_cmpgt_epi8(pairs(v, 6), pairs(v, 4));
        if (_mm256_movemask_epi8(_mm256_and_si256(even, odd)) != -1) break;
    }
#endif
    for (; i < bytes; ++i) {
        if (!legal(meta[i] & 15)) return 2 * i;
        if (!legal(meta[i] >> 4)) return 2 * i + 1;
    }
    return -1;
}

SK_ISA_END
