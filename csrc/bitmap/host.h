// Entries of the bitmap host kernels: argument structs and the table that each instruction set fills in.
#pragma once
#include "../core/isa.h"
#include "../core/table.h"
#include "../core/types.h"

namespace sk {

// bits [n, ceil(k / 8)], offsets [n + 1], values [offsets[n]]; sparsekern/bitmap/layout.py has the invariants.
struct Bitmap {
    const void* values;
    const uint8_t* bits;
    const int64_t* offsets;
    Dtype dtype;
    int64_t n, k;

    int64_t row_bytes() const { return (k + 7) / 8; }
};

struct BitmapKernels {
    // Y = act(X W^T * scale + bias); x has the type of the values, y any floating one.
    void (*mm)(const Bitmap& w, const Dense& x, const Dense& y, const Epilogue& e, int threads);

    // bits [n, ceil(k / 8)] and offsets [n + 1] of W[n, k] (row stride ld). -0.0 counts as zero, NaN does not.
    void (*count)(const Dense& w, uint8_t* bits, int64_t* offsets, int threads);
    // values [offsets[n]] of W at the bits.
    void (*fill)(const Dense& w, const uint8_t* bits, const int64_t* offsets, void* values, int threads);
    void (*unpack)(const Bitmap& w, void* dense, int threads);
    // col [offsets[n]] int32: the column of every stored value.
    void (*columns)(const uint8_t* bits, const int64_t* offsets, int64_t n, int64_t k, int32_t* col, int threads);
};

SK_DECLARE_TABLES(BitmapKernels, bitmap_kernels)

}  // namespace sk
