// The entries of csr on NVIDIA GPUs, and the list of its kernels. No CUDA header: bindings and tests include it.
#pragma once
#include <cstdint>
#include <vector>

namespace sk::csr {

// MmTile<rows of a subwarp, warps, stages>, SddmmTile (the same), MvTile<tokens>: each for fp32, bf16,
// fp16. A kernel's number is its place in its list. Many rows share a slice of X, or few do: where rows are dense,
// where there is little work, and on cards whose blocks have less than 100 KB of shared memory.
#define SK_CSR_MM(X) X(8, 16, 2) X(2, 8, 1)
#define SK_CSR_SDDMM(X) X(8, 16, 2) X(2, 8, 1)
#define SK_CSR_MV(X) X(1) X(4)

struct TileInfo {
    int rows_per, warps, rows, tokens, shared_bytes;
};

// What sparsekern/_rows_cuda.py needs to know of the kernels for values of this type.
std::vector<TileInfo> mm_tiles(int type);
std::vector<TileInfo> sddmm_tiles(int type);
int slice_columns();
int mv_staged_bytes();

struct Out {  // of mm and mv
    uint64_t y, bias;
    int64_t y_stride;
    int bias_type, activation;
};

struct PanelsCall {
    int type;
    uint64_t x, panels, stream;
    int64_t stride;
    int m, columns;
};

struct MmCall {
    int kernel, type;
    uint64_t values, offsets, starts, order, items, panels, partials, counters, stream;
    int64_t nnz;
    int m, n, k, items_count;
    Out out;
};

struct MvCall {
    int kernel, type;
    uint64_t values, short_columns, columns, crow, units, splits, x, partials, counters, stream;
    int64_t x_stride, nnz;
    int m, n, k, units_count, chunk, workers;
    Out out;
};

struct SddmmCall {
    int kernel, type;
    uint64_t offsets, starts, order, x_panels, dy_panels, sums, out, stream;
    int64_t nnz;
    int m, n, k, groups, splits;
};

// Each throws std::runtime_error where the launch fails.
void panels(const PanelsCall& call);
void mm(const MmCall& call);
void mv(const MvCall& call);
void sddmm(const SddmmCall& call);

}  // namespace sk::csr
