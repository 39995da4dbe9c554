// Dense to csr and back, as fast as memory allows: count the nonzeros of each row, then compress them.
#include <cstring>
#include <limits>

#include "rows.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kRows = 32;                 // rows of one task
constexpr int64_t kSerialElements = 1 << 18;  // elements below which one thread is fastest

// An unsigned integer as wide as the element, and the bits that tell it from a zero of either sign.
template <Dtype T>
struct Bits {
    using type = uint16_t;
    static constexpr type value = 0x7fff;
};
template <>
struct Bits<Dtype::f32> {
    using type = uint32_t;
    static constexpr type value = 0x7fffffff;
};
template <>
struct Bits<Dtype::i8> {
    using type = uint8_t;
    static constexpr type value = 0xff;
};

template <Dtype T>
int64_t count_row(const typename Bits<T>::type* p, int64_t cols) {
    int64_t n = 0, k = 0;
#if SK_LEVEL >= SK_AVX512
    constexpr int kStep = 64 / int(sizeof(*p));
    for (; k + kStep <= cols; k += kStep) {
        const __m512i v = _mm512_loadu_si512(p + k);
        if constexpr (T == Dtype::f32) {
            n += __builtin_popcount(_mm512_test_epi32_mask(v, _mm512_set1_epi32(0x7fffffff)));
        } else if constexpr (T == Dtype::i8) {
            n += __builtin_popcountll(_mm512_test_epi8_mask(v, v));
        } else {
            n += __builtin_popcount(_mm512_test_epi16_mask(v, _mm512_set1_epi16(0x7fff)));
        }
    }
#endif
    for (; k < cols; ++k) n += (p[k] & Bits<T>::value) != 0;
    return n;
}

template <Dtype T>
void fill_row(const typename Bits<T>::type* p, [[maybe_unused]] int64_t cols, typename Bits<T>::type* values,
              int32_t* col, int64_t count) {
    int64_t n = 0, k = 0;
#if SK_LEVEL >= SK_AVX512
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; k + 16 <= cols; k += 16) {
        __m512i v;
        __mmask16 keep;
        if constexpr (T == Dtype::f32) {
            v = _mm512_loadu_si512(p + k);
            keep = _mm512_test_epi32_mask(v, _mm512_set1_epi32(0x7fffffff));
        } else if constexpr (T == Dtype::i8) {
            v = _mm512_maskz_cvtepu8_epi32(__mmask16(-1), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k)));
            keep = _mm512_test_epi32_mask(v, v);
        } else {
            v = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + k)));
            keep = _mm512_test_epi32_mask(v, _mm512_set1_epi32(0x7fff));
        }
        const int kept = __builtin_popcount(keep);
        // Masked stores: the elements behind may be the next row's, and another thread's.
        const __mmask16 first = __mmask16((1u << kept) - 1);
        v = _mm512_maskz_compress_epi32(keep, v);
        if constexpr (T == Dtype::f32)
            _mm512_mask_storeu_epi32(values + n, first, v);
        else if constexpr (T == Dtype::i8)
            _mm512_mask_cvtepi32_storeu_epi8(values + n, first, v);
        else
            _mm512_mask_cvtepi32_storeu_epi16(values + n, first, v);
        _mm512_mask_storeu_epi32(col + n, first, _mm512_maskz_compress_epi32(keep, index));
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
        n += kept;
    }
#endif
    // Writes every element and moves on only behind a nonzero: no branch to mispredict.
    for (; n < count; ++k) {
        values[n] = p[k];
        col[n] = int32_t(k);
        n += (p[k] & Bits<T>::value) != 0;
    }
}

template <class F>
void for_rows(const CsrPack& a, F&& body) {
    const int threads = a.dense.rows * a.dense.cols < kSerialElements ? 1 : a.threads;
    parallel_for((a.dense.rows + kRows - 1) / kRows, threads, [&](int64_t task) {
        const int64_t end = std::min(a.dense.rows, (task + 1) * kRows);
        for (int64_t n = task * kRows; n < end; ++n) body(n);
    });
}

template <Dtype T>
typename Bits<T>::type* row_of(const CsrPack& a, int64_t n) {
    return static_cast<typename Bits<T>::type*>(a.dense.data) + n * a.dense.ld;
}

}  // namespace

int64_t csr_count(const CsrPack& a) {
    dispatch_values(a.dense.dtype, [&]<Dtype T>() {
        for_rows(a, [&](int64_t n) { a.crow[n + 1] = int32_t(count_row<T>(row_of<T>(a, n), a.dense.cols)); });
    });
    int64_t total = 0;
    a.crow[0] = 0;
    for (int64_t n = 1; n <= a.dense.rows; ++n) {
        total += a.crow[n];
        if (total > std::numeric_limits<int32_t>::max()) return -1;
        a.crow[n] = int32_t(total);
    }
    return total;
}

void csr_fill(const CsrPack& a) {
    dispatch_values(a.dense.dtype, [&]<Dtype T>() {
        auto* values = static_cast<typename Bits<T>::type*>(a.values);
        for_rows(a, [&](int64_t n) {
            const int64_t start = a.crow[n];
            fill_row<T>(row_of<T>(a, n), a.dense.cols, values + start, a.col + start, a.crow[n + 1] - start);
        });
    });
}

void csr_unpack(const CsrPack& a) {
    dispatch_values(a.dense.dtype, [&]<Dtype T>() {
        const auto* values = static_cast<const typename Bits<T>::type*>(a.values);
        for_rows(a, [&](int64_t n) {
            auto* row = row_of<T>(a, n);
            if (a.dense.cols) std::memset(row, 0, size_t(a.dense.cols) * sizeof(*row));
            for (int64_t j = a.crow[n]; j < a.crow[n + 1]; ++j) row[a.col[j]] = values[j];
        });
    });
}

SK_ISA_END
