// From dense rows to (mask bits, stream of values): what the sp24 and the bitmap packers have in common.
// Everything goes in steps of 16 elements; the last step of a row has fewer.
#pragma once
#include "vec.h"

SK_ISA_BEGIN

inline constexpr int kStep = 16;

// Magnitude as an integer that orders like it: 0 for both zeros, NaN above infinity, all NaN alike.
template <Dtype T>
inline uint32_t magnitude(const void* p, int64_t i) {
    if constexpr (T == Dtype::f32) {
        uint32_t bits;
        __builtin_memcpy(&bits, static_cast<const char*>(p) + 4 * i, 4);
        bits &= 0x7fffffffu;
        return bits > 0x7f800001u ? 0x7f800001u : bits;
    } else if constexpr (T == Dtype::i8) {
        const int v = static_cast<const int8_t*>(p)[i];
        return uint32_t(v < 0 ? -v : v);
    } else {
        const uint32_t top = T == Dtype::bf16 ? 0x7f81u : 0x7c01u;
        const uint32_t bits = static_cast<const uint16_t*>(p)[i] & 0x7fffu;
        return bits > top ? top : bits;
    }
}

#if SK_LEVEL >= SK_AVX512
// `count` elements at p as integers, one in a lane, zeros behind.
template <Dtype T>
inline __m512i load_step(const void* p, int count) {
    const __mmask16 some = count >= kStep ? __mmask16(-1) : __mmask16((1u << count) - 1);
    if constexpr (T == Dtype::f32) return _mm512_maskz_loadu_epi32(some, p);
    if constexpr (T == Dtype::i8) return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, p));
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
}

// The lowest `count` lanes to p.
template <Dtype T>
inline void store_step(void* p, __m512i v, int count) {
    const __mmask16 some = count >= kStep ? __mmask16(-1) : __mmask16((1u << count) - 1);
    if constexpr (T == Dtype::f32) {
        _mm512_mask_storeu_epi32(p, some, v);
    } else if constexpr (T == Dtype::i8) {
        _mm_mask_storeu_epi8(p, some, _mm512_cvtepi32_epi8(v));
    } else {
        _mm256_mask_storeu_epi16(p, some, _mm512_cvtepi32_epi16(v));
    }
}

template <Dtype T>
inline __m512i magnitudes(__m512i v) {
    if constexpr (T == Dtype::i8) return _mm512_abs_epi32(v);
    const int sign_free = T == Dtype::f32 ? 0x7fffffff : 0x7fff;
    const int top = T == Dtype::f32 ? 0x7f800001 : T == Dtype::bf16 ? 0x7f81 : 0x7c01;
    return _mm512_min_epu32(_mm512_and_si512(v, _mm512_set1_epi32(sign_free)), _mm512_set1_epi32(top));
}
#endif

// Which of `count` <= 16 elements at p are nonzero: -0.0 is not, NaN is.
template <Dtype T>
inline uint32_t nonzeros(const void* p, int count) {
#if SK_LEVEL >= SK_AVX512
    const __m512i v = load_step<T>(p, count);
    const int sign_free = T == Dtype::f32 ? 0x7fffffff : T == Dtype::i8 ? -1 : 0x7fff;
    return _mm512_test_epi32_mask(v, _mm512_set1_epi32(sign_free));
#else
#if SK_LEVEL >= SK_AVX2
    if (count == kStep) {
        const char* c = static_cast<const char*>(p);
        uint32_t zero = 0;
        for (int half = 0; half < 2; ++half) {
            const auto* from = reinterpret_cast<const __m128i*>(c + half * 8 * size_of(T));
            __m256i v;
            if constexpr (T == Dtype::f32) {
                v = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), 1);
            } else if constexpr (T == Dtype::i8) {
                v = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from));
            } else {
                v = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 17);
            }
            const __m256 none = _mm256_castsi256_ps(_mm256_cmpeq_epi32(v, _mm256_setzero_si256()));
            zero |= uint32_t(_mm256_movemask_ps(none)) << 8 * half;
        }
        return ~zero & 0xffffu;
    }
#endif
    uint32_t mask = 0;
    for (int i = 0; i < count; ++i) mask |= uint32_t(magnitude<T>(p, i) != 0) << i;
    return mask;
#endif
}

// The elements of p whose bit is set, one after the other, to out; writes no more than these.
template <Dtype T>
inline void compress(const void* p, uint32_t mask, void* out, int count) {
#if SK_LEVEL >= SK_AVX512
    const __m512i v = _mm512_maskz_compress_epi32(__mmask16(mask), load_step<T>(p, count));
    store_step<T>(out, v, __builtin_popcount(mask));
#else
    (void)count;
    constexpr int64_t kSize = size_of(T);
    char* to = static_cast<char*>(out);
    for (; mask; mask &= mask - 1, to += kSize)
        __builtin_memcpy(to, static_cast<const char*>(p) + __builtin_ctz(mask) * kSize, kSize);
#endif
}

// The inverse: `count` elements to out, the values at p where a bit is set, zeros elsewhere.
template <Dtype T>
inline void spread(const void* p, uint32_t mask, void* out, int count) {
#if SK_LEVEL >= SK_AVX512
    const __m512i v = load_step<T>(p, __builtin_popcount(mask));
    store_step<T>(out, _mm512_maskz_expand_epi32(__mmask16(mask), v), count);
#else
    constexpr int64_t kSize = size_of(T);
    const char* from = static_cast<const char*>(p);
    __builtin_memset(out, 0, size_t(count * kSize));
    for (; mask; mask &= mask - 1, from += kSize)
        __builtin_memcpy(static_cast<char*>(out) + __builtin_ctz(mask) * kSize, from, kSize);
#endif
}

// Calls f.template operator()<T>() for any element type.
template <class F>
inline auto dispatch_any(Dtype t, F&& f) {
    if (t == Dtype::i8) return f.template operator()<Dtype::i8>();
    return dispatch_float(t, f);
}

SK_ISA_END
