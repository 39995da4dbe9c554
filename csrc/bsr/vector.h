// Register tiles: MR output rows by NV vectors of columns, a broadcast dword of the left operand against vectors of
// the right. mm and mm_t broadcast weights against panels of tokens, sddmm broadcasts dY against columns of X.
#pragma once
#include "walk.h"

SK_ISA_BEGIN

struct OpF32 {
    using Acc = Vf;
    using Vec = Vf;
    static Vec load(const char* p) { return vf_load(reinterpret_cast<const float*>(p)); }
    static Vec broadcast(const char* p) {
        float f;
        __builtin_memcpy(&f, p, 4);
        return vf_set(f);
    }
    static void step(Acc& acc, Vec w, Vec x) { acc += w * x; }
};

inline Vi vi_load(const char* p) {
    Vi v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Vi vi_broadcast(const char* p) {
    int32_t i;
    __builtin_memcpy(&i, p, 4);
    return i - Vi{};
}

struct OpI16 {  // pairs of int16
    using Acc = Vi;
    using Vec = Vi;
    static Vec load(const char* p) { return vi_load(p); }
    static Vec broadcast(const char* p) { return vi_broadcast(p); }
    static void step(Acc& acc, Vec w, Vec x) {
#if SK_LEVEL >= SK_AVX512
        acc += (Vi)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif SK_LEVEL >= SK_AVX2
        acc += (Vi)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
        acc += (Vi)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
        acc += (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
    }
};

#if SK_LEVEL >= SK_AVX512_BF16
struct OpBf16 {  // pairs of bf16
    using Acc = Vf;
    using Vec = Vi;
    static Vec load(const char* p) { return vi_load(p); }
    static Vec broadcast(const char* p) { return vi_broadcast(p); }
    static void step(Acc& acc, Vec w, Vec x) { acc = (Vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x); }
};

struct OpI8 {  // quads: x unsigned (its panel holds x + 128), w signed
    using Acc = Vi;
    using Vec = Vi;
    static Vec load(const char* p) { return vi_load(p); }
    static Vec broadcast(const char* p) { return vi_broadcast(p); }
    static void step(Acc& acc, Vec w, Vec x) { acc = (Vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w); }
};
#endif

// 32 registers: 8 x 3 accumulators; 16 registers: 4 x 3 and 4 left for operands.
#if SK_LEVEL >= SK_AVX512 || defined(__aarch64__)
inline constexpr int kRowsMax = 8;
#else
inline constexpr int kRowsMax = 4;
#endif
inline constexpr int kVectorsMax = 3;

// c[r][0 .. NV * kLanes] (+)= the sum over blocks j0 .. j1 of the walk, for rows r0 .. r0 + MR of the group; block 0
// begins the sums. With block j the panel's rows for block j + fetch come into the first-level cache. DepthUnit: the
// dwords of a row lie side by side (a_depth is 4).
template <class Op, int MR, int NV, bool DepthUnit>
void walk_tile(const Walk& w, int64_t j0, int64_t j1, int64_t fetch, int64_t r0, const char* panel, char* c) {
    constexpr int64_t kRow = NV * sizeof(Vf);
    typename Op::Acc acc[MR][NV] = {};
    if (j0 > 0)
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < NV; ++v) __builtin_memcpy(&acc[r][v], c + r * kRow + v * sizeof(Vf), sizeof(Vf));
    const int64_t a_depth = DepthUnit ? 4 : w.a_depth, a_row = DepthUnit ? w.a_row : 4;
    for (int64_t j = j0; j < j1; ++j) {
        const char* a = w.a + (w.order ? int64_t(w.order[j]) : j) * w.a_block + r0 * a_row;
        const char* x = panel + w.index[j] * w.depth * kRow;
        const char* next = panel + w.index[j + fetch < w.blocks ? j + fetch : j] * w.depth * kRow;
        for (int64_t l = 0; l < w.ahead_lines; ++l) prefetch_l2(w.ahead + j * w.a_block + l * 64);
        for (int64_t k = 0; k < w.depth; ++k, a += a_depth, x += kRow, next += kRow) {
            typename Op::Vec xv[NV];
#pragma GCC unroll 3
            for (int v = 0; v < NV; ++v) {
                prefetch_l1(next + v * sizeof(Vf));
                xv[v] = Op::load(x + v * sizeof(Vf));
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                const typename Op::Vec weight = Op::broadcast(a + r * a_row);
#pragma GCC unroll 3
                for (int v = 0; v < NV; ++v) Op::step(acc[r][v], weight, xv[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) __builtin_memcpy(c + r * kRow + v * sizeof(Vf), &acc[r][v], sizeof(Vf));
}

constexpr int64_t kSegment = 12 << 10;  // bytes of a panel that stay in the first-level cache for all rows of a strip

// Rows r0 .. r1 of a group against one panel of NV vectors; c begins at row r0. `ahead` advances by what was fetched.
// Several register tiles share the panel's rows of a segment of blocks while those are in the first-level cache.
template <class Op, int NV, bool DepthUnit>
void walk_rows(Walk& w, int64_t r0, int64_t r1, const char* panel, char* c) {
    constexpr int64_t kRow = NV * sizeof(Vf);
    const int64_t fit = kSegment / (w.depth * kRow), segment = r1 - r0 <= kRowsMax ? w.blocks : fit < 1 ? 1 : fit;
    const char* ahead = w.ahead;
    int64_t j0 = 0;
    do {
        const int64_t j1 = j0 + segment < w.blocks ? j0 + segment : w.blocks;
        int64_t r = r0;
        w.ahead = ahead;
        const auto run = [&]<int MR>() {
            for (; r + MR <= r1; r += MR, w.ahead += w.ahead_lines * 64)
                walk_tile<Op, MR, NV, DepthUnit>(w, j0, j1,
                                                 r + MR == r1   ? segment
                                                 : r + j0 == r0 ? 1
                                                                : 0,
                                                 r, panel, c + (r - r0) * kRow);
        };
        run.template operator()<kRowsMax>();
        if constexpr (kRowsMax > 4) run.template operator()<4>();
        run.template operator()<2>();
        run.template operator()<1>();
        j0 = j1;
    } while (j0 < w.blocks);
}

using WalkRows = void (*)(Walk&, int64_t r0, int64_t r1, const char* panel, char* c);

template <class Op>
WalkRows pick_walk(int vectors, bool transposed) {
    static constexpr WalkRows kTable[2][kVectorsMax] = {
        {walk_rows<Op, 1, true>, walk_rows<Op, 2, true>, walk_rows<Op, 3, true>},
        {walk_rows<Op, 1, false>, walk_rows<Op, 2, false>, walk_rows<Op, 3, false>}};
    return kTable[transposed][vectors - 1];
}

inline WalkRows pick_walk(Mode mode, int vectors, bool transposed) {
    switch (mode) {
#if SK_LEVEL >= SK_AVX512_BF16
        case Mode::bf16: return pick_walk<OpBf16>(vectors, transposed);
        case Mode::i8: return pick_walk<OpI8>(vectors, false);
#endif
        case Mode::i16: return pick_walk<OpI16>(vectors, false);
        default: return pick_walk<OpF32>(vectors, transposed);
    }
}

SK_ISA_END
