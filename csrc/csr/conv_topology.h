// What a convolution derives once from the places of its stored weights: tile boundaries and the transposed stream.
// Compiled once, for any processor.
#pragma once
#include <cstdint>
#include <vector>

#include "conv.h"

namespace sk {

// segment[t * rows + n]: where tile t (columns from t * tile on) of row n begins; tiles + 1 lines of `rows`.
inline void conv_segments(const int32_t* crow, const int32_t* col, int64_t rows, int64_t tile, int64_t tiles,
                          int32_t* segment) {
    for (int64_t n = 0; n < rows; ++n) {
        int32_t i = crow[n];
        for (int64_t t = 0; t < tiles; ++t) {
            while (i < crow[n + 1] && col[i] < t * tile) ++i;
            segment[t * rows + n] = i;
        }
        segment[tiles * rows + n] = crow[n + 1];
    }
}

// The stream as blocks of 4 rows (ConvStream). counts: 16 per block and tile; base: 4; start: one; entries: room for
// twice the stored places. Narrow without gather. Returns how many entries were written.
template <class Entry>
int64_t conv_blocks(const int32_t* crow, const int32_t* col, const int32_t* gather, int64_t rows, int64_t groups,
                    int64_t tile, int64_t tiles, uint16_t* counts, int32_t* base, int32_t* start, Entry* entries) {
    const int64_t group_rows = rows / groups, per_group = (group_rows + 3) / 4, blocks = groups * per_group;
    std::vector<int32_t> next(crow, crow + rows);  // where each row goes on
    std::vector<int32_t> place(size_t(tile) * 4);
    std::vector<uint8_t> mask(size_t(tile), 0);
    std::vector<int32_t> of_mask[16];
    int64_t written = 0;
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t b = 0; b < blocks; ++b, counts += 16, base += 4) {
            const int64_t group = b / per_group, row0 = group * group_rows + b % per_group * 4;
            for (int r = 0; r < 4; ++r) {
                const int64_t n = row0 + r;
                base[r] = 0;
                if (n >= (group + 1) * group_rows) continue;
                int32_t& i = next[size_t(n)];
                if (!gather) base[r] = i;
                for (; i < crow[n + 1] && col[i] < (t + 1) * tile; ++i) {
                    const size_t k = size_t(col[i] - t * tile);
                    mask[k] = uint8_t(mask[k] | 1 << r);
                    place[4 * k + size_t(r)] = gather ? gather[i] : i - base[r];
                }
            }
            for (size_t k = 0; k < size_t(tile); ++k)
                if (mask[k]) of_mask[mask[k]].push_back(int32_t(k)), mask[k] = 0;
            *start++ = int32_t(written);
            counts[0] = 0;
            for (int m = 1; m < 16; ++m) {
                counts[m] = uint16_t(of_mask[m].size());
                for (const int32_t k : of_mask[m]) {
                    entries[written++] = Entry(k);
                    for (int r = 0; r < 4; ++r)
                        if (m >> r & 1) entries[written++] = Entry(place[4 * size_t(k) + size_t(r)]);
                }
                of_mask[m].clear();
            }
        }
    return written;
}

// The stream for the gradient of the input: rows (group, a, b, c) for phases a, b of the stride, columns (n, r, s) with
// n within the group; ascending. crow_t has groups * stride_h * stride_w * (channels / groups) + 1 elements. gather_t
// holds positions in `values`. Stored places beyond K (zeros by contract) are left out; returns how many remain.
inline int64_t conv_transpose(const ConvGeometry& g, int64_t channels, const int32_t* crow, const int32_t* col,
                              const int32_t* gather, int64_t rows, int32_t* crow_t, int32_t* col_t, int32_t* gather_t) {
    const int64_t per_group = channels / g.groups, group_rows = rows / g.groups, area = g.kh * g.kw;
    const int64_t phases = g.stride_h * g.stride_w, rows_t = g.groups * phases * per_group;
    struct Place {
        int64_t row, tap;
    };
    std::vector<Place> places(size_t(per_group * area));  // of each column, within its group
    for (int64_t k = 0; k < per_group * area; ++k) {
        const int64_t c = g.order == ConvOrder::crs ? k / area : k % per_group;
        const int64_t tap = g.order == ConvOrder::crs ? k % area : k / per_group;
        const int64_t a = tap / g.kw * g.dilation_h % g.stride_h, b = tap % g.kw * g.dilation_w % g.stride_w;
        places[size_t(k)] = {(a * g.stride_w + b) * per_group + c, tap};
    }
    const int64_t k_end = per_group * area;
    std::vector<int32_t> next(size_t(rows_t + 1), 0);
    for (int64_t n = 0; n < rows; ++n)
        for (int32_t i = crow[n]; i < crow[n + 1]; ++i)
            if (col[i] < k_end) ++next[size_t(n / group_rows * phases * per_group + places[size_t(col[i])].row + 1)];
    for (int64_t r = 0; r < rows_t; ++r) next[size_t(r + 1)] += next[size_t(r)];
    for (int64_t r = 0; r <= rows_t; ++r) crow_t[r] = next[size_t(r)];
    // Rows come in ascending order, and within one (n, channel) its taps do: every transposed row is ascending.
    for (int64_t n = 0; n < rows; ++n)
        for (int32_t i = crow[n]; i < crow[n + 1]; ++i) {
            if (col[i] >= k_end) continue;
            const Place& p = places[size_t(col[i])];
            const int32_t at = next[size_t(n / group_rows * phases * per_group + p.row)]++;
            col_t[at] = int32_t(n % group_rows * area + p.tap);
            gather_t[at] = gather ? gather[i] : i;
        }
    return crow_t[rows_t];
}

}  // namespace sk
