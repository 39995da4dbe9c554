// The inner loops of a convolution over one strip of pixels: rows of the weight stream against shifted input planes.
#pragma once
#include "../core/panel.h"
#include "conv.h"

SK_ISA_BEGIN

// A strip is up to kStripVectors vectors of consecutive pixels. kBlockVectors of them times 4 rows are as many
// accumulators as the registers hold beside the pixels themselves.
inline constexpr int kBlockRows = 4;
#if SK_LEVEL >= SK_AVX512
inline constexpr int kStripVectors = 6, kBlockVectors = 6;
#else
inline constexpr int kStripVectors = 8, kBlockVectors = 2;
#endif
inline constexpr int kStrip = kStripVectors * kLanes;

// Where the pixels of column k lie: in a panel packed for this strip (aligned, in the first cache), column k at
// base + k * stride, or, Direct, in the padded planes themselves at a table's offset.
struct StripInput {
    const float* base;
    int64_t stride;
    const int64_t* offset;
};

template <bool Direct>
inline const float* strip_at(const StripInput& in, int32_t k) {
    return in.base + (Direct ? in.offset[k] : k * in.stride);
}

// The columns that exactly the rows of mask M store.
template <int M, int U, class Entry>
[[gnu::always_inline]] inline void block_columns(Vf (&acc)[kBlockRows][U], const float* const (&values)[kBlockRows],
                                                 const Entry*& entry, int count, const float* base, int64_t stride) {
    for (int i = 0; i < count; ++i) {
        const float* p = base + *entry++ * stride;
        Vf x[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) x[u] = vf_load(p + u * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r)
            if (M >> r & 1) {
                const float value = values[r][*entry++];
#pragma GCC unroll 8
                for (int u = 0; u < U; ++u) acc[r][u] += value * x[u];
            }
    }
}

// Consecutive blocks of one tile (see ConvStream).
template <class Entry>
struct BlockRange {
    const float* values;
    const uint16_t* counts;
    const int32_t *base, *start;
    const Entry* entries;
    int64_t blocks;
    int lines;  // cache lines that one row's values usually take
};

// sums[n][0 .. width) (+)= sum over the stored values of row n of value * pixels, for U vectors of a strip of `width`
// pixels. First: the tile starts the sum. Loads are what limits this kernel, and sharing them halves them at 50 %
// density; the short loops' mispredicted ends hide behind the multiply-adds still queued.
template <int U, class Entry>
void strip_blocks(const BlockRange<Entry>& w, const float* panel, int64_t width, float* sums, bool first) {
    for (int64_t b = 0; b < w.blocks; ++b, sums += kBlockRows * width) {
        Vf acc[kBlockRows][U];
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) acc[r][u] = first ? Vf{} : vf_load(sums + r * width + u * kLanes);
        const uint16_t* counts = w.counts + 16 * b;
        const int32_t* base = w.base + kBlockRows * b;
        const float* const values[kBlockRows] = {w.values + base[0], w.values + base[1], w.values + base[2],
                                                 w.values + base[3]};
        const Entry* entry = w.entries + w.start[b];
        if (b + 2 < w.blocks)  // a row's values in a tile are too short a run for the hardware to see it coming
            for (int r = 0; r < kBlockRows; ++r)
                for (int line = 0; line < w.lines; ++line)
                    __builtin_prefetch(w.values + base[2 * kBlockRows + r] + 16 * line);
        [&]<int... I>(std::integer_sequence<int, I...>) {
            (block_columns<I + 1, U>(acc, values, entry, counts[I + 1], panel, width), ...);
        }(std::make_integer_sequence<int, 15>{});
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) vf_store(sums + r * width + u * kLanes, acc[r][u]);
    }
}

// The same row by row, straight from the planes.
template <int U>
void strip_rows(const float* values, const int32_t* col, const int32_t* begin, const int32_t* end, int64_t rows,
                const StripInput& in, float* sums) {
    for (int64_t n = 0; n < rows; ++n, sums += U * kLanes) {
        Vf a[U] = {};
        for (int64_t i = begin[n]; i < end[n]; ++i) {
            const float* x = strip_at<true>(in, col[i]);
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) a[u] += values[i] * vf_load(x + u * kLanes);
        }
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) vf_store(sums + u * kLanes, a[u]);
    }
}

// Lane j of the result is the sum of r[j]'s lanes.
template <int Step = kLanes / 2>
inline Vf sum_each(Vf (&r)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < Step; ++i) {
        transpose_pair<Step>(r[i], r[i + Step], std::make_index_sequence<kLanes>{});
        r[i] += r[i + Step];
    }
    if constexpr (Step > 1) return sum_each<Step / 2>(r);
    return r[0];
}

// dw[i] += dy row . pixels of column col[i], for every stored value of the rows.
template <int U, bool Direct>
void strip_dots(const int32_t* col, const int32_t* begin, const int32_t* end, int64_t rows, const StripInput& in,
                const float* dy, float* dw) {
    for (int64_t n = 0; n < rows; ++n, dy += U * kLanes) {
        Vf d[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) d[u] = vf_load(dy + u * kLanes);
        auto dot = [&](int32_t k) {
            const float* x = strip_at<Direct>(in, k);
            Vf s = d[0] * vf_load(x);
#pragma GCC unroll 8
            for (int u = 1; u < U; ++u) s += d[u] * vf_load(x + u * kLanes);
            return s;
        };
        Vf r[kLanes];
        int64_t i = begin[n];
        const int64_t stop = end[n];
        for (; i + kLanes <= stop; i += kLanes) {
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) r[j] = dot(col[i + j]);
            vf_store(dw + i, vf_load(dw + i) + sum_each(r));
        }
        if (i < stop) {
            const int left = int(stop - i);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) r[j] = j < left ? dot(col[i + j]) : Vf{};
            vf_store_part<Dtype::f32>(dw + i, vf_load_part<Dtype::f32>(dw + i, left) + sum_each(r), left);
        }
    }
}

// Calls f.template operator()<U>() for U in 1 .. Most.
template <int Most = kStripVectors, class F>
inline void dispatch_strip(int vectors, F&& f) {
    if constexpr (Most == 1)
        f.template operator()<1>();
    else if (vectors == Most)
        f.template operator()<Most>();
    else
        dispatch_strip<Most - 1>(vectors, f);
}

SK_ISA_END
