// What mm and mm_t share: which arithmetic a call uses, how its weights are walked, and how work is split.
//
// Both products walk "groups" (block rows in mm, block columns in mm_t). A group gives `outs` output features; each of
// its blocks contracts `depth` dwords of the packed activations. A dword is one float, a pair of bf16, four int8 or
// (levels without int8 dot products) a pair of int16, so that one set of loops serves every type.
#pragma once
#include "../core/amx.h"
#include "../core/panel.h"
#include "../core/parallel.h"
#include "host.h"

SK_ISA_BEGIN

enum class Mode { f32, bf16, i8, i16 };

// The weights of one group. Element (row r, dword k) of its block j is the dword at
// a + (order ? order[j] : j) * a_block + r * a_row + k * a_depth bytes; the block meets the panel from dword row
// index[j] * depth on.
struct Walk {
    const char* a;
    int64_t a_row, a_depth, a_block;
    const int32_t *order, *index;
    int64_t blocks, depth;
    // Weights that will be wanted next: with block j, `ahead_lines` cache lines from ahead + j * a_block on.
    const char* ahead = nullptr;
    int64_t ahead_lines = 0;
};

inline void prefetch_l1(const char* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const char* p) { __builtin_prefetch(p, 0, 2); }

// One product as both drivers see it.
struct Product {
    const BsrWeight& w;
    bool transposed;                       // mm_t
    const int32_t *start, *index, *order;  // per group: its blocks; the other coordinate; block numbers or null
    Dense x, y;
    Epilogue epilogue;
    int threads;

    Mode mode = Mode::f32;
    int per_dword = 1;  // contracted elements in a dword

    int64_t groups() const { return transposed ? w.grid_cols() : w.grid_rows(); }
    int64_t outs() const { return transposed ? w.block_cols : w.block_rows; }
    int64_t total_outs() const { return transposed ? w.cols : w.rows; }
    int64_t inner() const { return transposed ? w.block_rows : w.block_cols; }
    int64_t depth() const { return inner() / per_dword; }
    int64_t panel_depth() const { return (transposed ? w.grid_rows() : w.grid_cols()) * depth(); }
    int64_t blocks() const { return start[groups()]; }
    int64_t tokens() const { return x.rows; }
    const char* x_row(int64_t m) const { return static_cast<const char*>(x.data) + m * x.ld * size_of(x.dtype); }
    char* y_at(int64_t m, int64_t n) const { return static_cast<char*>(y.data) + (m * y.ld + n) * size_of(y.dtype); }
};

// Chooses the arithmetic. bf16 pairs need the contraction to be even within a block, int8 quads a multiple of four.
inline void choose_mode(Product& p) {
    p.mode = Mode::f32, p.per_dword = 1;
    if (p.x.dtype == Dtype::i8) {
        p.mode = Mode::i16, p.per_dword = p.inner() % 2 == 0 ? 2 : 1;
#if SK_LEVEL >= SK_AVX512_BF16
        if (p.inner() % 4 == 0) p.mode = Mode::i8, p.per_dword = 4;
#endif
    }
#if SK_LEVEL >= SK_AVX512_BF16
    // Scaled int8 rows are not bf16 numbers, so mm_t of int8 weights stays with floats.
    if (p.x.dtype == Dtype::bf16 && p.inner() % 2 == 0 && !(p.transposed && p.w.dtype == Dtype::i8))
        p.mode = Mode::bf16, p.per_dword = 2;
#endif
}

// ---------------------------------------------------------------------------------------------- staged weights

template <Dtype T>
inline void widen(float* out, const void* in, int64_t count) {
    const char* from = static_cast<const char*>(in);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) vf_store(out + i, vf_load_as<T>(from + i * size_of(T)));
    for (; i < count; ++i) out[i] = load_as<T>(in, i);
}

inline void widen(float* out, const void* in, Dtype type, int64_t count) {
    switch (type) {
        case Dtype::f32: return widen<Dtype::f32>(out, in, count);
        case Dtype::bf16: return widen<Dtype::bf16>(out, in, count);
        case Dtype::f16: return widen<Dtype::f16>(out, in, count);
        case Dtype::i8: return widen<Dtype::i8>(out, in, count);
    }
}

// int8 to bf16 is exact.
inline void widen_to_bf16(uint16_t* out, const int8_t* in, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) vf_store_as<Dtype::bf16>(out + i, vf_load_as<Dtype::i8>(in + i));
    for (; i < count; ++i) out[i] = f32_to_bf16(float(in[i]));
}

// One int16 a dword (its other half zero), or pairs.
inline void widen_to_i16(void* out, const int8_t* in, int64_t count, int per_dword) {
    if (per_dword == 2) {
        int16_t* to = static_cast<int16_t*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = in[i];
    } else {
        uint32_t* to = static_cast<uint32_t*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = uint16_t(int16_t(in[i]));
    }
}

// Rows 2p and 2p + 1 of src (16-bit elements, `stride` bytes apart) interleaved into row p of dwords: `rows` rows of
// `count` elements. A missing last row counts as zero.
inline void interleave_rows(uint32_t* out, int64_t out_stride, const void* src, int64_t stride, int64_t rows,
                            int64_t count) {
    const char* from = static_cast<const char*>(src);
    for (int64_t p = 0; 2 * p < rows; ++p) {
        const auto* even = reinterpret_cast<const uint16_t*>(from + 2 * p * stride);
        const auto* odd = 2 * p + 1 < rows ? reinterpret_cast<const uint16_t*>(from + (2 * p + 1) * stride) : nullptr;
        uint32_t* to = out + p * out_stride;
        int64_t i = 0;
#if SK_LEVEL >= SK_AVX512
        for (; i + 16 <= count; i += 16) {
            const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i)));
            const __m512i hi =
                odd ? _mm512_slli_epi32(
                          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i))), 16)
                    : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i, _mm512_or_si512(lo, hi));
        }
#endif
        for (; i < count; ++i) to[i] = even[i] | uint32_t(odd ? odd[i] : 0) << 16;
    }
}

// Can the kernels read the values where they are?
inline bool in_place(const Product& p) {
    switch (p.mode) {
        case Mode::f32: return p.w.dtype == Dtype::f32;
        case Mode::bf16: return p.w.dtype == Dtype::bf16 && !p.transposed;
        case Mode::i8: return true;
        default: return false;
    }
}

// The weights of group g, converted into scratch slot `slot` of this thread where they cannot be read in place.
inline Walk walk_group(const Product& p, int64_t g, int slot) {
    const int64_t first = p.start[g], count = p.start[g + 1] - first;
    const int64_t elements = p.w.block_rows * p.w.block_cols, bytes = elements * size_of(p.w.dtype);
    const char* values = static_cast<const char*>(p.w.values);
    const int32_t* order = p.order ? p.order + first : nullptr;
    Walk walk{};
    walk.index = p.index + first, walk.blocks = count, walk.depth = p.depth();
    walk.a_depth = p.transposed ? p.w.block_cols * 4 : 4;
    walk.a_row = p.transposed ? 4 : p.depth() * 4;
    walk.a_block = elements / p.per_dword * 4;
    if (in_place(p)) {
        walk.order = order;
        walk.a = order ? values : values + first * bytes;
        return walk;
    }
    char* staged = static_cast<char*>(scratch(slot, size_t(count * walk.a_block + 64)));
    walk.a = staged;
    for (int64_t j = 0; j < count; ++j) {
        const int64_t block = order ? order[j] : first + j;
        const void* from = values + block * bytes;
        char* to = staged + j * walk.a_block;
        if (p.mode == Mode::f32) {
            float* out = reinterpret_cast<float*>(to);
            widen(out, from, p.w.dtype, elements);
            if (p.transposed && p.w.scale) {
                for (int64_t r = 0; r < p.w.block_rows; ++r) {
                    const int64_t n = int64_t(p.index[first + j]) * p.w.block_rows + r;
                    const float s = n < p.w.rows ? p.w.scale[n] : 0.0f;
                    for (int64_t c = 0; c < p.w.block_cols; ++c) out[r * p.w.block_cols + c] *= s;
                }
            }
        } else if (p.mode == Mode::i16) {
            widen_to_i16(to, static_cast<const int8_t*>(from), elements, p.per_dword);
        } else if (p.transposed) {
            interleave_rows(reinterpret_cast<uint32_t*>(to), p.w.block_cols, from, p.w.block_cols * 2, p.w.block_rows,
                            p.w.block_cols);
        } else {
            widen_to_bf16(reinterpret_cast<uint16_t*>(to), static_cast<const int8_t*>(from), elements);
        }
    }
    return walk;
}

// ---------------------------------------------------------------------------------------------- splitting work

inline constexpr int64_t kSerialWork = int64_t(1) << 21;  // multiply-adds below which threads cost more than they give

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first group of part `part` of `parts`, so that parts have about equal numbers of blocks. A group costs some
// work of its own (its epilogue), counted as `fixed` blocks.
inline int64_t split_groups(const int32_t* start, int64_t groups, int64_t part, int64_t parts, int64_t fixed = 2) {
    if (part <= 0) return 0;
    if (part >= parts) return groups;
    const int64_t target = (start[groups] + groups * fixed) * part / parts;
    int64_t low = 0, high = groups;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (start[middle] + middle * fixed < target)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

inline float sum_lanes(Vf v) {
#if SK_LEVEL >= SK_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#elif SK_LEVEL >= SK_AVX2
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

SK_ISA_END
