// The inner loops of a convolution over one strip of pixels: rows of the weight stream against shifted input planes.
#pragma once
#include "../core/panel.h"
#include "conv.h"

SK_ISA_BEGIN

// A strip is up to 8 vectors of consecutive pixels: 8 accumulators hide the latency of the multiply-add.
inline constexpr int kStripVectors = 8;
inline constexpr int kStrip = kStripVectors * kLanes;

// Where the pixels of column k lie: in a panel [tile][kStrip] packed for this strip (aligned, in the first cache), or,
// Direct, in the padded planes themselves at a table's offset.
struct StripInput {
    const float* base;  // of column 0, so that column k of a panel lies at base + k * kStrip
    const int64_t* offset;
};

template <bool Direct>
inline const float* strip_at(const StripInput& in, int32_t k) {
    if constexpr (Direct) return in.base + in.offset[k];
    return in.base + int64_t(k) * kStrip;
}

// acc[n][0 .. U) (+)= sum over the row's stored values of value * pixels. First: the tile starts the sum.
template <int U, bool Direct>
void strip_rows(const float* values, const int32_t* col, const int32_t* begin, const int32_t* end, int64_t rows,
                const StripInput& in, float* acc, bool first) {
    for (int64_t n = 0; n < rows; ++n, acc += U * kLanes) {
        Vf a[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) a[u] = first ? Vf{} : vf_load(acc + u * kLanes);
        int64_t i = begin[n];
        const int64_t stop = end[n];
        if constexpr (U <= 4) {  // two values at a time, or the few accumulators would wait for one another
            Vf b[U] = {};
            for (; i + 1 < stop; i += 2) {
                const float *x = strip_at<Direct>(in, col[i]), *z = strip_at<Direct>(in, col[i + 1]);
#pragma GCC unroll 8
                for (int u = 0; u < U; ++u) {
                    a[u] += values[i] * vf_load(x + u * kLanes);
                    b[u] += values[i + 1] * vf_load(z + u * kLanes);
                }
            }
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) a[u] += b[u];
        }
        for (; i < stop; ++i) {
            const float* x = strip_at<Direct>(in, col[i]);
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) a[u] += values[i] * vf_load(x + u * kLanes);
        }
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) vf_store(acc + u * kLanes, a[u]);
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

// Calls f.template operator()<U>() for U in 1 .. kStripVectors.
template <class F>
inline void dispatch_strip(int vectors, F&& f) {
    switch (vectors) {
        case 1: return f.template operator()<1>();
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
        case 4: return f.template operator()<4>();
        case 5: return f.template operator()<5>();
        case 6: return f.template operator()<6>();
        case 7: return f.template operator()<7>();
        default: return f.template operator()<8>();
    }
}

SK_ISA_END
