// Tiles (AMX) and the dword transpose that feeds them.
//
// A product on tiles is C[16 x 16 float or int32] += A[16 x 64 bytes] * B[16 x 64 bytes]: A holds rows of the left
// operand as they lie in memory (32 bf16 or 64 int8 of the contraction), B holds the right operand in "VNNI" order,
// row p = the dwords (2 bf16 or 4 int8 along the contraction) number p of 16 columns. So B is A's layout with its
// dwords transposed, and one routine (`pack_dwords`) packs float columns, bf16 pairs and int8 quads alike.
//
// The unit is 16 columns of B by 16 dwords of depth, and takes one cycle per row of A: a tile product costs 16
// cycles whatever its depth, a tile load 8 cycles (two rows a cycle), a tile store 16.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"

#if SK_LEVEL >= SK_AVX512
#include "intrin.h"

SK_ISA_BEGIN

// r[i] lane j <-> r[j] lane i, for 16 vectors of 16 dwords.
inline void transpose_dwords(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column j of each 128-bit lane, rows i..i+3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // then a 4 x 4 transpose of 128-bit lanes
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// The first n (0..64) bytes as a mask.
inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64(0) : n <= 0 ? 0 : (__mmask64(1) << n) - 1; }

// One panel of 16 columns: dst[p][j], p < depth dwords, j < width, is dword p of row j of src. `rows` (<= width <=
// 16) rows of `bytes` bytes exist, `stride` bytes apart; what lies beyond them is written as zero, nothing beyond is
// read. dst rows are `pitch` bytes apart (0: 4 * width); depth >= bytes / 4 rounded up.
inline void pack_dwords(void* dst, const void* src, int64_t stride, int rows, int64_t bytes, int64_t depth,
                        int width = 16, int64_t pitch = 0) {
    if (pitch == 0) pitch = 4 * width;
    char* out = static_cast<char*>(dst);
    const char* in = static_cast<const char*>(src);
    const __mmask16 columns = static_cast<__mmask16>((1u << width) - 1);
    for (int64_t p = 0; p < depth; p += 16) {
        const __mmask64 valid = first_bytes(bytes - 4 * p);
        __m512i r[16];
        for (int j = 0; j < rows; ++j) _mm_prefetch(in + j * stride + 4 * p + 512, _MM_HINT_T0);
        for (int j = 0; j < 16; ++j)
            r[j] = _mm512_maskz_loadu_epi8(j < rows ? valid : 0, in + (j < rows ? j : 0) * stride + 4 * p);
        transpose_dwords(r);
        const int64_t n = depth - p;
        if (width == 16 && n >= 16) {
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (p + i) * pitch, r[i]);
        } else {
            for (int i = 0; i < 16; ++i)
                if (i < n) _mm512_mask_storeu_epi32(out + (p + i) * pitch, columns, r[i]);
        }
    }
}

SK_ISA_END
#endif

#if SK_LEVEL >= SK_AMX
SK_ISA_BEGIN

// What LDTILECFG reads: the shape of each of the 8 tiles.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};

    TileConfig& tile(int t, int row_count, int bytes) {
        rows[t] = uint8_t(row_count), column_bytes[t] = uint16_t(bytes);
        return *this;
    }
};

// Configures this thread's tiles for a scope. Loading a configuration zeroes the tiles; leaving releases them, so
// that the kernel no longer saves 8 KB of state at each context switch.
class TileScope {
public:
    explicit TileScope(const TileConfig& config) { load(config); }
    ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    void load(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
};

// Own wrappers: those of immintrin.h do not tell the compiler that they touch memory, so that it may move the stores
// of a packed panel past the tile loads that read it.
template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>  // for data that is used once
inline void tile_stream(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>  // C float
inline void tile_dp_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>  // C int32, A and B signed
inline void tile_dp_i8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

SK_ISA_END
#endif
