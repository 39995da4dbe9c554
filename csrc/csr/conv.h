// Entries of the pruned-weight convolution: argument structs and the table that each instruction set fills in.
//
// The weight [O, C / groups, kh, kw] is flattened to rows of K = C / groups * kh * kw columns and stored as a stream:
// the stored values row after row, the column of each, ascending within a row. Every element-wise format is such a
// stream: csr as it is, bitmap and 2:4 with columns derived from their bits. A column beyond K means a zero input.
#pragma once
#include "../core/isa.h"
#include "../core/types.h"

namespace sk {

enum class ConvOrder : int { crs = 0, rsc = 1 };  // column k is (c, r, s), or (r, s, c): channels innermost

struct ConvGeometry {
    int64_t kh, kw, stride_h, stride_w, dilation_h, dilation_w;
    int64_t pad_top, pad_left;  // what is missing below and to the right reads as zero, whatever its size
    int64_t groups;
    ConvOrder order;
};

// Images in any of torch's dense memory orders; strides in elements, at least one of stride_w and stride_c is 1.
struct ConvTensor {
    void* data;
    Dtype dtype;
    int64_t images, channels, height, width;
    int64_t stride_b, stride_c, stride_h, stride_w;
};

// Columns are cut in tiles of `tile`. A stream comes in one of two forms, or both:
// - rows: place i holds the value values[gather ? gather[i] : i] of column col[i]; segment[t * rows + n] is where tile
// t
//   of row n begins, for t up to the number of tiles included. The gradient of the weight reads this form, and so does
//   everything where tile = 0: a single tile, read without packing (for weights with few rows or few stored values,
//   depthwise ones above all);
// - blocks of 4 rows of a group, for the products: the columns of a block and tile sorted by which of its rows store
//   them, so that what is loaded once serves up to 4 rows. Block and tile are entry i = t * blocks + b of three arrays,
//   blocks = groups * ceil(rows of a group / 4). Mask m (bit r: row r) has counts[16 * i + m] columns; entries from
//   start[i] on hold, mask by mask from 1 to 15, a column within the tile and, for each row r of the mask, the place in
//   `values` less base[4 * i + r]. Entries are bytes where `narrow` (values in stream order, tile <= 256), else int32.
struct ConvStream {
    const void* values;
    Dtype dtype;
    int64_t value_count;
    const int32_t *gather, *col, *segment;
    const uint16_t* counts;
    const int32_t *base, *start;
    const void* entries;
    bool narrow;
    int64_t rows, columns, stored, tile;  // columns: per group, at least K; stored: places of the stream
};

struct ConvForward {
    ConvGeometry geometry;
    ConvTensor x, y;
    ConvStream weight;
    Epilogue epilogue;
    int threads;
};

// dx = the transposed convolution of dy; `weight` is the transposed stream (conv_topology.h): its row (g, a, b, c)
// holds channel c of group g for the taps that meet input positions of phase (a, b) of the stride, its column is (n, r,
// s).
struct ConvBackwardInput {
    ConvGeometry geometry;
    ConvTensor dy, dx;
    ConvStream weight;
    int threads;
};

// The gradient of each stored value of `weight` (its values are not read), written to dvalues[gather ? gather[i] : i].
struct ConvBackwardWeight {
    ConvGeometry geometry;
    ConvTensor dy, x;
    ConvStream weight;
    void* dvalues;
    int threads;
};

struct ConvTable {
    void (*forward)(const ConvForward&);
    void (*backward_input)(const ConvBackwardInput&);
    void (*backward_weight)(const ConvBackwardWeight&);
    // The tile to cut columns into, at most 256; 0 where packing would not pay. `rows` and `stored` are those of one
    // group, `pixels` all the outputs of one channel.
    int64_t (*tile)(int64_t rows, int64_t columns, int64_t k, int64_t stored, int64_t pixels);
};

namespace portable {
extern const ConvTable conv_table;
}
namespace avx2 {
extern const ConvTable conv_table;
}
namespace avx512 {
extern const ConvTable conv_table;
}
namespace avx512_bf16 {
extern const ConvTable conv_table;
}
namespace amx {
extern const ConvTable conv_table;
}

}  // namespace sk
