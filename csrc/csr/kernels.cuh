// The entries of csr on NVIDIA GPUs, and the list of its kernels. No CUDA header: bindings and tests include it.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace sk::csr {

// MmTile<rows of a subwarp, warps, stages>, SddmmTile (the same), MvTile<tokens, 8-bit distances>: each for fp32, bf16,
// fp16. A kernel's number is its place in its list. Many rows share a slice of X, or few do: where rows are dense,
// where there is little work, and on cards whose blocks have less than 100 KB of shared memory.
#define SK_CSR_MM(X) X(8, 16, 2) X(2, 8, 1)
#define SK_CSR_SDDMM(X) X(8, 16, 2) X(2, 8, 1)
#define SK_CSR_MV(X) X(1, true) X(4, true) X(1, false) X(4, false)
// ConvTile<rows of a warp, warps, kilobytes of a slice>: many rows share a slice of the images, or few do.
#define SK_CSR_CONV(X) X(8, 16, 40) X(2, 8, 20)

struct TileInfo {
    int rows_per, warps, rows, tokens, shared_bytes;
};

struct ConvTileInfo {
    int rows_per, warps, rows, positions, words, slice_words;  // words: 32 bits each, of the positions and of a slice
};

// What sparsekern/_rows_cuda.py and sparsekern/conv/rows_cuda.py need to know of the kernels for values of this type.
std::vector<TileInfo> mm_tiles(int type);
std::vector<TileInfo> sddmm_tiles(int type);
std::vector<ConvTileInfo> conv_tiles(int type);
int slice_columns();
int mv_staged_bytes();

struct Out {  // what the sums become (device/epilogue.h); 0 where there is no bias, scale or residual
    uint64_t y, bias, x_scale, residual;
    int64_t y_stride, residual_stride;
    int type, bias_type, activation;
    float beta = 1.0f;  // of the residual
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
    uint64_t values, distances, short_columns, columns, units, splits, x, partials, counters, stream;
    int64_t x_stride, nnz;
    int m, n, k, units_count, workers;
    Out out;
};

struct SddmmCall {
    int kernel, type;
    uint64_t offsets, starts, order, x_panels, dy_panels, sums, out, stream;
    int64_t nnz;
    int m, n, k, groups, splits;
};

struct PlanesCall {
    int type;
    uint64_t x, planes, sheets, stream;
    int sheets_count;
    std::array<int64_t, 8> image;  // images, channels, height, width, and their strides
    std::array<int, 6> grid;       // step_h, step_w, pad_h, pad_w, pitch, lines (planes.cuh)
    int64_t plane_words;
};

struct ConvCall {
    int kernel, type;
    uint64_t values, offsets, starts, order, items, planes, pieces, maps, y, bias, partials, counters, stream;
    int64_t nnz;
    int items_count, bias_type, activation;
    std::array<int64_t, 6> memory;  // plane_words, channel_stride, unit_stride, words, y_image, y_channel (conv.cuh)
    std::array<int, 7> tiling;      // unit_tiles, unit_images, unit_lines, images, pitch, lines, tiles
    std::array<int, 8> walk;        // slices, pieces, slice_channels, channel_words, group_channels, group_rows,
                                    // row_blocks, map_rows
};

// Each throws std::runtime_error where the launch fails.
void panels(const PanelsCall& call);
void mm(const MmCall& call);
void mv(const MvCall& call);
void sddmm(const SddmmCall& call);
void planes(const PlanesCall& call);
void conv(const ConvCall& call);

}  // namespace sk::csr
