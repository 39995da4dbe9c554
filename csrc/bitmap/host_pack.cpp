// Dense <-> bitmap, and what is derived from the bits.
#include "../core/compress.h"
#include "../core/expand.h"
#include "../core/parallel.h"
#include "host.h"
#include "host_parts.h"

SK_ISA_BEGIN
namespace {

// Calls body(row) for every row, in tasks of about a quarter of a million weights.
template <class Body>
void rows_of(int64_t n, int64_t k, int threads, Body&& body) {
    const int64_t step = k ? (int64_t(1) << 18) / k + 1 : n + 1;
    if (n * k < (1 << 17)) threads = 1;
    parallel_for((n + step - 1) / step, threads, [&](int64_t task) {
        for (int64_t r = task * step; r < n && r < (task + 1) * step; ++r) body(r);
    });
}

inline uint32_t step_bits(const uint8_t* bits, int64_t i, int64_t bytes) {
    return uint32_t(bits[i]) | (i + 1 < bytes ? uint32_t(bits[i + 1]) << 8 : 0);
}

}  // namespace

void bitmap_count(const Dense& w, uint8_t* bits, int64_t* offsets, int threads) {
    const int64_t bytes = (w.cols + 7) / 8, size = size_of(w.dtype);
    offsets[0] = 0;
    rows_of(w.rows, w.cols, threads, [&](int64_t r) {
        dispatch_any(w.dtype, [&]<Dtype T>() {
            const char* row = static_cast<const char*>(w.data) + r * w.ld * size;
            uint8_t* to = bits + r * bytes;
            int64_t stored = 0;
            for (int64_t k = 0; k < w.cols; k += kStep) {
                const int count = w.cols - k < kStep ? int(w.cols - k) : kStep;
                const uint32_t mask = nonzeros<T>(row + k * size_of(T), count);
                stored += __builtin_popcount(mask);
                *to++ = uint8_t(mask);
                if (count > 8) *to++ = uint8_t(mask >> 8);
            }
            offsets[r + 1] = stored;
        });
    });
    for (int64_t r = 0; r < w.rows; ++r) offsets[r + 1] += offsets[r];
}

void bitmap_fill(const Dense& w, const uint8_t* bits, const int64_t* offsets, void* values, int threads) {
    const int64_t bytes = (w.cols + 7) / 8, size = size_of(w.dtype);
    rows_of(w.rows, w.cols, threads, [&](int64_t r) {
        dispatch_any(w.dtype, [&]<Dtype T>() {
            const char* row = static_cast<const char*>(w.data) + r * w.ld * size;
            char* to = static_cast<char*>(values) + offsets[r] * size_of(T);
            for (int64_t i = 0; i < bytes; i += 2) {
                const int count = w.cols - i * 8 < kStep ? int(w.cols - i * 8) : kStep;
                const uint32_t mask = step_bits(bits + r * bytes, i, bytes);
                compress<T>(row + i * 8 * size_of(T), mask, to, count);
                to += __builtin_popcount(mask) * size_of(T);
            }
        });
    });
}

void bitmap_unpack(const Bitmap& w, void* dense, int threads) {
    const int64_t bytes = w.row_bytes(), size = size_of(w.dtype);
    rows_of(w.n, w.k, threads, [&](int64_t r) {
        dispatch_any(w.dtype, [&]<Dtype T>() {
            const char* from = static_cast<const char*>(w.values) + w.offsets[r] * size;
            char* row = static_cast<char*>(dense) + r * w.k * size;
            for (int64_t i = 0; i < bytes; i += 2) {
                const int count = w.k - i * 8 < kStep ? int(w.k - i * 8) : kStep;
                const uint32_t mask = step_bits(w.bits + r * bytes, i, bytes);
                spread<T>(from, mask, row + i * 8 * size_of(T), count);
                from += __builtin_popcount(mask) * size_of(T);
            }
        });
    });
}

void bitmap_columns(const uint8_t* bits, const int64_t* offsets, int64_t n, int64_t k, int32_t* col, int threads) {
    const int64_t bytes = (k + 7) / 8;
    rows_of(n, k, threads, [&](int64_t r) {
        int32_t* to = col + offsets[r];
        for (int64_t i = 0; i < bytes; i += 2) {
            uint32_t mask = step_bits(bits + r * bytes, i, bytes);
#if SK_LEVEL >= SK_AVX512
            const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(int(i * 8)));
            const int stored = __builtin_popcount(mask);
            store_step<Dtype::f32>(to, _mm512_maskz_compress_epi32(__mmask16(mask), at), stored);
            to += stored;
#else
            for (; mask; mask &= mask - 1) *to++ = int32_t(i * 8) + __builtin_ctz(mask);
#endif
        }
    });
}

SK_ISA_END
