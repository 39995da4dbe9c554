// From (mask bits, stream of values) to dense vectors: what the sp24 and the bitmap kernels have in common.
//
// A mask bit says whether a weight is stored; the stored ones follow each other in memory. `expand` spreads them
// over a vector, zeros between. 2:4 metadata becomes such a mask by a table of 16 entries. For 2:4 there is a second
// way, `pick`: leave the values dense and select the activations that belong to them, which costs one shuffle a
// token and no wasted multiplications.
#pragma once
#include "vec.h"

SK_ISA_BEGIN

// Weights in one step of the float kernels: two vectors.
inline constexpr int kChunk = 2 * kLanes;

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }       // to the second cache
inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // to the first

// ---- 2:4 metadata ------------------------------------------------------------------------------------------

// nibble -> the two bits of the kept weights. Illegal nibbles (check() refuses them) give two bits as well.
inline constexpr uint8_t kNibbleMask[16] = {0x3, 0x3, 0x5, 0x9, 0x3, 0x3, 0x6, 0xa,
                                            0x5, 0x6, 0x5, 0xc, 0x9, 0xa, 0xc, 0x9};

// `bytes` <= 64 bytes of 2:4 metadata -> as many bytes of mask bits; out has room for 64.
inline void sp24_masks(const uint8_t* meta, int64_t bytes, uint8_t* out) {
#if SK_LEVEL >= SK_AVX512
    const __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNibbleMask)));
    const __mmask64 some = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
    const __m512i m = _mm512_maskz_loadu_epi8(some, meta), nib = _mm512_set1_epi8(15);
    const __m512i even = _mm512_shuffle_epi8(low, _mm512_and_si512(m, nib));
    const __m512i odd = _mm512_shuffle_epi8(low, _mm512_and_si512(_mm512_srli_epi16(m, 4), nib));
    const __m512i mask = _mm512_or_si512(even, _mm512_slli_epi16(odd, 4));
    _mm512_storeu_si512(out, _mm512_maskz_mov_epi8(some, mask));
#else
    for (int64_t i = 0; i < bytes; ++i) out[i] = uint8_t(kNibbleMask[meta[i] & 15] | kNibbleMask[meta[i] >> 4] << 4);
    for (int64_t i = bytes; i < 64; ++i) out[i] = 0;
#endif
}

// The activations that kLanes stored values of a 2:4 row meet, out of kChunk activations at x.
struct Picks {
#if SK_LEVEL >= SK_AVX512
    __m512i index;
    // meta: kLanes / 4 bytes, low byte first.
    explicit Picks(uint32_t meta) {
        const __m512i shift = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i base = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
        const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(int(meta)), shift);
        index = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), base, 0xea);  // bits & 3 | base
    }
    Vf operator()(const float* x) const {
        return (Vf)_mm512_permutex2var_ps(_mm512_loadu_ps(x), index, _mm512_loadu_ps(x + 16));
    }
#elif SK_LEVEL >= SK_AVX2
    __m256i index;
    explicit Picks(uint32_t meta) {
        const __m256i bits =
            _mm256_srlv_epi32(_mm256_set1_epi32(int(meta)), _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0));
        index = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(3)), _mm256_set_epi32(4, 4, 0, 0, 4, 4, 0, 0));
    }
    Vf operator()(const float* x) const {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), index);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), index);
        return (Vf)_mm256_blend_ps(low, high, 0xf0);
    }
#else
    int at[4];
    explicit Picks(uint32_t meta)
        : at{int(meta & 3), int(meta >> 2 & 3), int(4 + (meta >> 4 & 3)), int(4 + (meta >> 6 & 3))} {}
    Vf operator()(const float* x) const { return Vf{x[at[0]], x[at[1]], x[at[2]], x[at[3]]}; }
#endif
};

#if SK_LEVEL >= SK_AVX512_BF16
// The same for 32 stored bf16 values, out of 64 activations.
struct PicksBf16 {
    struct Words {
        uint64_t shift[8];  // of every output word, in the low byte
        uint16_t base[32];
    };
    static constexpr Words kWords = [] {
        Words w{};
        for (int i = 0; i < 32; ++i) {
            w.shift[i / 4] |= uint64_t(2 * i) << 16 * (i % 4);
            w.base[i] = uint16_t(4 * (i / 2));
        }
        return w;
    }();
    __m512i index;
    explicit PicksBf16(uint64_t meta) {
        const __m512i bits =
            _mm512_multishift_epi64_epi8(_mm512_loadu_si512(kWords.shift), _mm512_set1_epi64(int64_t(meta)));
        index = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(3), _mm512_loadu_si512(kWords.base), 0xea);
    }
    __m512bh operator()(const uint16_t* x) const {
        return (__m512bh)_mm512_permutex2var_epi16(_mm512_loadu_si512(x), index, _mm512_loadu_si512(x + 32));
    }
};
#endif

// ---- expansion ---------------------------------------------------------------------------------------------

struct Pair {
    Vf low, high;
};

#if SK_LEVEL == SK_AVX2
// byte of mask -> for each of 8 lanes the position of its value, or a negative number where nothing is stored.
struct ExpandTable {
    int8_t at[256][8];
};
inline constexpr ExpandTable kExpand = [] {
    ExpandTable t{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0, next = 0; i < 8; ++i) t.at[mask][i] = mask >> i & 1 ? int8_t(next++) : int8_t(-1);
    return t;
}();

inline Vf expand8(uint32_t mask, Vf v) {
    const __m256i at = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.at[mask])));
    return (Vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)v, at), _mm256_setzero_ps(), _mm256_castsi256_ps(at));
}
#endif

// The dense floats of kChunk weights, from values that begin at v. Reads kChunk elements at v, stored or not.
template <Dtype T>
inline Pair expand(uint32_t mask, const void* v) {
    const char* p = static_cast<const char*>(v);
#if SK_LEVEL >= SK_AVX512_BF16
    if constexpr (T == Dtype::f16 || T == Dtype::bf16) {
        const __m512i w = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p));
        const __m256i low = _mm512_castsi512_si256(w), high = _mm512_extracti64x4_epi64(w, 1);
        if constexpr (T == Dtype::f16) return {(Vf)_mm512_cvtph_ps(low), (Vf)_mm512_cvtph_ps(high)};
        return {(Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16),
                (Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)};
    }
#endif
#if SK_LEVEL >= SK_AVX512
    const char* next = p + __builtin_popcount(mask & 0xffff) * size_of(T);
    return {(Vf)_mm512_maskz_expand_ps(__mmask16(mask), (__m512)vf_load_as<T>(p)),
            (Vf)_mm512_maskz_expand_ps(__mmask16(mask >> 16), (__m512)vf_load_as<T>(next))};
#elif SK_LEVEL >= SK_AVX2
    const char* next = p + __builtin_popcount(mask & 0xff) * size_of(T);
    return {expand8(mask & 0xff, vf_load_as<T>(p)), expand8(mask >> 8, vf_load_as<T>(next))};
#else
    float w[8];
    for (int i = 0, next = 0; i < 8; ++i) {
        const float f = load_as<T>(p, next);
        w[i] = mask >> i & 1 ? f : 0.0f;
        next += mask >> i & 1;
    }
    return {vf_load(w), vf_load(w + 4)};
#endif
}

// 4 bytes at p, low byte first; `bytes` < 4 reads only those.
inline uint32_t load_bits(const uint8_t* p, int64_t bytes = 4) {
    uint32_t word = 0;
    if (bytes >= 4) {
        __builtin_memcpy(&word, p, 4);
    } else {
        for (int64_t i = 0; i < bytes; ++i) word |= uint32_t(p[i]) << 8 * i;
    }
    return word;
}

// Sum of the lanes, pairwise.
inline float vf_total(Vf v) {
#if SK_LEVEL >= SK_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#elif SK_LEVEL >= SK_AVX2
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

SK_ISA_END
