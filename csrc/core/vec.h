// Float vectors as wide as the instruction set, over the compiler's vector extension: `a * b + c` is one FMA,
// `Vf(s)`-style broadcasts fold into operands, and the same source serves AVX-512, AVX2 and portable builds.
#pragma once
#include <cstdint>
#include <cstring>

#include "intrin.h"
#include "isa.h"
#include "types.h"

SK_ISA_BEGIN

#if SK_LEVEL >= SK_AVX512
inline constexpr int kLanes = 16;
#elif SK_LEVEL >= SK_AVX2
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t Vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Vh __attribute__((vector_size(2 * kLanes)));

inline Vf vf_load(const float* p) {
    Vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void vf_store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vf vf_set(float s) { return s - Vf{}; }

inline float bf16_to_f32(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest even; NaN stays a quiet NaN.
inline uint16_t f32_to_bf16(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if SK_LEVEL >= SK_AVX2
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t f32_to_f16(float f) { return _cvtss_sh(f, 0); }
#else
inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // subnormal: fraction * 2^-24 is exact in float
        const float f = float(fraction) * 0x1p-24f;
        __builtin_memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t f32_to_f16(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65520 or more: infinity
    if (magnitude < 0x38800000u) {                                 // below 2^-14: let float addition round
        float m;
        __builtin_memcpy(&m, &magnitude, 4);
        const float shifted = m + 0.5f;  // the ulp of 0.5 is 2^-24
        uint32_t r;
        __builtin_memcpy(&r, &shifted, 4);
        return uint16_t(sign | (r - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return uint16_t(sign | (rounded - 0x38000000u) >> 13);
}
#endif

// Conversions of one vector between memory of any element type and float lanes.
template <Dtype T>
inline Vf vf_load_as(const void* p) {
    if constexpr (T == Dtype::f32) {
        return vf_load(static_cast<const float*>(p));
    } else if constexpr (T == Dtype::bf16) {
        Vh h;
        __builtin_memcpy(&h, p, sizeof h);
        const Vi wide = __builtin_convertvector(h, Vi) << 16;
        return (Vf)wide;
    } else if constexpr (T == Dtype::f16) {
#if SK_LEVEL >= SK_AVX512
        // The masked form: g++ 12 warns about its own header's undefined source operand in the plain one.
        return (Vf)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif SK_LEVEL >= SK_AVX2
        return (Vf)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
        Vf v;
        for (int i = 0; i < kLanes; ++i) v[i] = f16_to_f32(static_cast<const uint16_t*>(p)[i]);
        return v;
#endif
    } else {  // int8; the compiler would convert lane by lane
#if SK_LEVEL >= SK_AVX512
        const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return (Vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif SK_LEVEL >= SK_AVX2
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        return (Vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
        typedef int8_t Vb __attribute__((vector_size(kLanes)));
        Vb b;
        __builtin_memcpy(&b, p, sizeof b);
        return __builtin_convertvector(b, Vf);
#endif
    }
}

template <Dtype T>
inline float load_as(const void* p, int64_t i) {
    if constexpr (T == Dtype::f32) return static_cast<const float*>(p)[i];
    if constexpr (T == Dtype::bf16) return bf16_to_f32(static_cast<const uint16_t*>(p)[i]);
    if constexpr (T == Dtype::f16) return f16_to_f32(static_cast<const uint16_t*>(p)[i]);
    if constexpr (T == Dtype::i8) return float(static_cast<const int8_t*>(p)[i]);
}

template <Dtype T>
inline void store_as(void* p, int64_t i, float f) {
    static_assert(T != Dtype::i8, "int8 outputs need a rounding rule");
    if constexpr (T == Dtype::f32) static_cast<float*>(p)[i] = f;
    if constexpr (T == Dtype::bf16) static_cast<uint16_t*>(p)[i] = f32_to_bf16(f);
    if constexpr (T == Dtype::f16) static_cast<uint16_t*>(p)[i] = f32_to_f16(f);
}

template <Dtype T>
inline void vf_store_as(void* p, Vf v) {
    static_assert(T != Dtype::i8, "int8 outputs need a rounding rule");
    if constexpr (T == Dtype::f32) {
        vf_store(static_cast<float*>(p), v);
#if SK_LEVEL >= SK_AVX512_BF16
    } else if constexpr (T == Dtype::bf16) {
        const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
        __builtin_memcpy(p, &h, sizeof h);
#endif
#if SK_LEVEL >= SK_AVX512
    } else if constexpr (T == Dtype::f16) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, 0));
#elif SK_LEVEL >= SK_AVX2
    } else if constexpr (T == Dtype::f16) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#endif
    } else {
        for (int i = 0; i < kLanes; ++i) store_as<T>(p, i, v[i]);
    }
}

inline float vf_sum(Vf v) {
    float s = 0;
    for (int i = 0; i < kLanes; ++i) s += v[i];
    return s;
}

// Calls f.template operator()<T>() for the run-time type.
template <class F>
inline auto dispatch_float(Dtype t, F&& f) {
    switch (t) {
        case Dtype::bf16: return f.template operator()<Dtype::bf16>();
        case Dtype::f16: return f.template operator()<Dtype::f16>();
        default: return f.template operator()<Dtype::f32>();
    }
}

SK_ISA_END
