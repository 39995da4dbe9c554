// Entries of the csr host kernels: argument structs and the table that each instruction set fills in.
//
// Every product takes plain pointers, so that any format whose values lie in row-major order (2:4, bitmap) can call it
// with its own values and a (crow, col) topology derived from it.
#pragma once
#include "../core/isa.h"
#include "../core/types.h"

namespace sk {

// A sparse matrix W[rows, cols]. Values of row n are values[crow[n] .. crow[n + 1]), their columns ascend in col.
//
// Tiled work walks W by row blocks and column tiles of `tile` <= 256 columns. `plan` is the index that csr_plan makes
// of (crow, col) for that width; it depends on nothing else. Null: it is made anew in every call that needs it.
// `stream` is what csr_stream makes, or null: a copy of the values in the order of the walk, and a hash of the values
// of each group's share (Watch in rows.h). Reading it is faster than picking the pieces out of `values`, because it
// comes from memory as one run; but it is a copy, so it is for weights that do not change. mm compares the hashes on
// its way.
struct CsrMatrix {
    const void* values;
    Dtype dtype;
    const int32_t* crow;
    const int32_t* col;
    int64_t rows, cols;
    const void* plan;
    int tile;
    const void* stream;
};

// One (row, column tile) piece of W: values[start .. start + count). The segments of a (row block, column tile) form a
// group, the groups go block by block. Inside a group segments ascend by count, so that the trip count of the inner
// loop, which would mispredict once a row, changes a few times a group instead.
struct CsrSegment {
    uint32_t start;
    uint16_t row;  // inside the row block
    uint16_t count;
};

inline constexpr int64_t kCsrMaxBlock = 512;
inline int64_t csr_block_rows(int64_t rows) {
    const int64_t eighth = (rows / 8 + 31) / 32 * 32;
    return eighth < 32 ? 32 : eighth > kCsrMaxBlock ? kCsrMaxBlock : eighth;
}
inline int64_t csr_blocks(int64_t rows) { return (rows + csr_block_rows(rows) - 1) / csr_block_rows(rows); }
inline int64_t csr_tiles(int64_t cols, int tile) { return (cols + tile - 1) / tile; }

// A plan is three arrays, one behind the other: the segments; where each group begins in the order of the walk
// (uint32, one per group); for every nonzero, in that order, its column inside the tile (uint8).
inline int64_t csr_plan_segments(int64_t rows, int64_t cols, int tile) {
    return csr_blocks(rows) * csr_block_rows(rows) * csr_tiles(cols, tile);
}
inline int64_t csr_plan_bytes(int64_t rows, int64_t cols, int64_t nnz, int tile) {
    return csr_plan_segments(rows, cols, tile) * int64_t(sizeof(CsrSegment)) +
           csr_blocks(rows) * csr_tiles(cols, tile) * 4 + nnz;
}
// A stream: the values, then from the next multiple of 4 bytes on one hash per group.
inline int64_t csr_stream_hashes(int64_t nnz, Dtype dtype) { return (nnz * size_of(dtype) + 3) / 4 * 4; }
inline int64_t csr_stream_bytes(int64_t rows, int64_t cols, int64_t nnz, int tile, Dtype dtype) {
    return csr_stream_hashes(nnz, dtype) + csr_blocks(rows) * csr_tiles(cols, tile) * 4;
}

// y[M, rows] = act(x[M, cols] W^T * scale + bias).
struct CsrMm {
    CsrMatrix w;
    Dense x, y;
    Epilogue epilogue;
    int threads;
};

// dx[M, cols] = dy[M, rows] W.
struct CsrMmT {
    CsrMatrix w;
    Dense dy, dx;
    int threads;
};

// dvalues[nnz] (of w.dtype, at w.values, which is written) = (dy^T x) at the stored positions.
struct CsrSddmm {
    CsrMatrix w;
    Dense dy, x;
    int threads;
};

// Between a dense matrix and csr. A zero of either sign is not stored, NaN is.
// csr_count fills crow[rows + 1] from `dense` and returns the number of nonzeros (it fails, -1, above 2^31 - 1);
// csr_fill then fills values (of the same type) and col; csr_unpack writes the whole dense matrix, zeros included.
struct CsrPack {
    Dense dense;
    int32_t* crow;
    int32_t* col;
    void* values;
    int threads;
};

struct CsrTable {
    // The tile of the plan that a product with m tokens wants; 0: mm uses none, mm_t and sddmm make a small one.
    int (*tile)(int64_t m, int64_t rows, int64_t cols, int64_t nnz);
    void (*plan)(const CsrMatrix& w, void* out, int threads);
    void (*stream)(const CsrMatrix& w, void* out, int threads);
    // False: w.stream does not belong to w.values (any more); y is right all the same, but took longer.
    bool (*mm)(const CsrMm&);
    void (*mm_t)(const CsrMmT&);
    void (*sddmm)(const CsrSddmm&);
    int64_t (*count)(const CsrPack&);
    void (*fill)(const CsrPack&);
    void (*unpack)(const CsrPack&);
};

#define SK_DECLARE_CSR(isa)          \
    namespace isa {                  \
    extern const CsrTable csr_table; \
    }
SK_DECLARE_CSR(portable)
SK_DECLARE_CSR(avx2)
SK_DECLARE_CSR(avx512)
SK_DECLARE_CSR(avx512_bf16)
SK_DECLARE_CSR(amx)
#undef SK_DECLARE_CSR

}  // namespace sk
