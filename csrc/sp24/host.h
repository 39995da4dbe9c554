// Entries of the sp24 host kernels: argument structs and the table that each instruction set fills in.
#pragma once
#include "../core/isa.h"
#include "../core/table.h"
#include "../core/types.h"

namespace sk {

// values [n, kp / 2], meta [n, kp / 8], kp = k rounded up to a multiple of 8.
// sparsekern/sp24/layout.py has the invariants; every nibble is legal.
struct Sp24 {
    const void* values;
    const uint8_t* meta;
    Dtype dtype;
    int64_t n, k;

    int64_t groups() const { return (k + 7) / 8 * 2; }
};

struct Sp24Kernels {
    // Y = act(X W^T * scale + bias). x: the type of the values, or for int8 values any type; y: float32 where x is
    // int8, else the type of x.
    void (*mm)(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads);

    // Packs W[n, k] (row stride ld) into values and meta. A group with more than two nonzeros is a violation:
    // returns its index row * groups + group, the first one; -1 where there is none. -0.0 counts as zero, NaN does
    // not. A group with fewer nonzeros is filled up with its last zeros, so an empty one stores 2 and 3 (0xE).
    int64_t (*pack)(const Dense& w, void* values, uint8_t* meta, int threads);
    // The same, of every group only the two of largest magnitude (NaN largest of all, ties: the lower index).
    void (*pack_top2)(const Dense& w, void* values, uint8_t* meta, int threads);
    void (*unpack)(const Sp24& w, void* dense, int threads);
    // col [n, kp / 2] int32: the column of every stored value; columns >= k belong to padding.
    void (*columns)(const uint8_t* meta, int64_t n, int64_t k, int32_t* col, int threads);
    // The first illegal nibble of `bytes` bytes (low nibble first), or -1.
    int64_t (*check)(const uint8_t* meta, int64_t bytes);

    // An honest dense competitor for the benches: bf16 y = x W^T at memory speed, any M.
    void (*dense_gemv)(const Dense& w, const Dense& x, const Dense& y, int threads);
};

SK_DECLARE_TABLES(Sp24Kernels, sp24_kernels)

}  // namespace sk
