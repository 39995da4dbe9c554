// Entries of the bsr host kernels: argument structs and the table that each instruction set fills in.
//
// A weight W[N, K] is cut into blocks of R x C; block row i owns the blocks crow[i] .. crow[i + 1], block j lies at
// values + j * R * C (row-major) in block column col[j]. Blocks that reach over the edge of W are zero there. The
// column-order view lists the blocks of block column c as crow_t[c] .. crow_t[c + 1]: block row row_t[j], block
// number gather_t[j].
#pragma once
#include "../core/isa.h"
#include "../core/types.h"

namespace sk {

struct BsrWeight {
    const void* values;
    Dtype dtype;                     // f32, bf16, f16 as the activations, or i8
    const float* scale;              // [N] for i8, else null
    int64_t rows, cols;              // N, K
    int64_t block_rows, block_cols;  // R, C
    int64_t grid_rows() const { return (rows + block_rows - 1) / block_rows; }
    int64_t grid_cols() const { return (cols + block_cols - 1) / block_cols; }
};

// y[M, N] = act(x[M, K] * W^T * scale + bias). x int8 (then W too) gives a float y from an exact int32 sum.
struct BsrMm {
    BsrWeight w;
    const int32_t *crow, *col;
    Dense x, y;
    Epilogue epilogue;
    int threads;
};

// dx[M, K] = dy[M, N] * W (rows of an int8 W count scale[n] times).
struct BsrMmT {
    BsrWeight w;
    const int32_t *crow_t, *row_t, *gather_t;
    Dense dy, dx;
    int threads;
};

// dvalues[j] = the block of dy^T * x under block j of W, in W's type (not i8); zero beyond the edges of W.
struct BsrSddmm {
    BsrWeight w;  // values: where the result goes
    const int32_t *crow, *col;
    Dense dy, x;
    int threads;
};

// Packing. A block is stored where it has an element that is not zero (-0.0 is zero, NaN is not).
struct BsrPack {
    void* dense;  // [N, K], row stride ld elements
    int64_t ld;
    Dtype dtype;
    int64_t rows, cols, block_rows, block_cols;
    uint8_t* flags;  // [grid_rows * grid_cols], 1 where the block is stored: from count to fill
    int32_t *crow, *col;
    void* values;
    int threads;
    int64_t grid_rows() const { return (rows + block_rows - 1) / block_rows; }
    int64_t grid_cols() const { return (cols + block_cols - 1) / block_cols; }
};

// crow_t[0 .. grid_cols], row_t[nnzb], gather_t[nnzb] from crow and col: a stable sort by column.
struct BsrTransposeIndex {
    const int32_t *crow, *col;
    int64_t grid_rows, grid_cols;
    int32_t *crow_t, *row_t, *gather_t;
};

struct BsrTable {
    void (*mm)(const BsrMm&);
    void (*mm_t)(const BsrMmT&);
    void (*sddmm)(const BsrSddmm&);
    void (*count)(const BsrPack&);   // writes flags and crow[0 .. grid_rows]
    void (*fill)(const BsrPack&);    // reads flags and crow; writes col and values
    void (*unpack)(const BsrPack&);  // reads crow, col, values; writes every element of dense
    void (*transpose_index)(const BsrTransposeIndex&);
};

#define SK_BSR_TABLE(isa)            \
    namespace isa {                  \
    extern const BsrTable bsr_table; \
    }
SK_BSR_TABLE(portable)
SK_BSR_TABLE(avx2)
SK_BSR_TABLE(avx512)
SK_BSR_TABLE(avx512_bf16)
SK_BSR_TABLE(amx)
#undef SK_BSR_TABLE

}  // namespace sk
