// The entries of sp24 on NVIDIA GPUs, and the list of its kernels. No CUDA header: bindings and tests include it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../device/images.h"

namespace sk::sp24 {

// Each kernel with its tile: MmSm90<blocks of rows of a warpgroup, tokens, stages, cluster>, MmSm80<blocks of rows,
// tokens, a warp's tokens, stages>, Decode<tokens, warps, stages>; and for e4m3 alone the MmSm90 that promote their
// sums (mm_sm90.cuh), with tiles that leave registers for it (256 tokens would spill). A kernel's number is its place
// among all of them, in this order.
#define SK_SP24_MM_SM90(X) \
    X(2, 128, 10, 2) X(2, 128, 10, 4) X(1, 256, 6, 4) X(1, 256, 6, 2) X(2, 128, 10, 1) X(2, 64, 15, 1)
#define SK_SP24_MM_SM80(X) X(2, 128, 32, 3) X(2, 64, 32, 3)
#define SK_SP24_DECODE(X) X(8, 8, 4) X(16, 8, 3) X(32, 8, 2) X(64, 4, 3) X(8, 4, 3) X(16, 4, 2)
#define SK_SP24_MM_SM90_PROMOTING(X) X(1, 192, 8, 4) X(1, 192, 8, 2) X(2, 64, 15, 1)
// The gradients, for 16-bit types alone, after them: MmTSm90<tokens, stages, cluster>, SddmmSm90<stages, cluster>.
#define SK_SP24_MM_T_SM90(X) X(128, 8, 2) X(128, 8, 1) X(64, 12, 1)
#define SK_SP24_SDDMM_SM90(X) X(4, 2) X(4, 1)

struct KernelInfo {
    std::string family;  // "mm_sm90", "mm_sm80", "decode", "mm_t_sm90", "sddmm_sm90"
    int rows, tokens, cluster, threads, shared_bytes;
    int partial_words;  // 32-bit words of `partials` for every worker
    int counters;       // for every tile
    bool accurate;      // sums of float's precision: not those of fp8 that wgmma keeps over the whole of K
};

// All kernels for operands of this type (sparsekern/_ext.py's number).
std::vector<KernelInfo> kernels(int type);

// How many clusters of a kernel of Hopper's families are on the current device at once; 0 where it cannot run there.
int resident(int type, int kernel);

struct MmCall {
    int kernel;
    int type, out_type, bias_type, activation;
    uint64_t fragments, x, y, w_scale, x_scale, bias, residual, partials, counters;
    int64_t x_stride, y_stride, residual_stride;
    int m, n, k;
    float alpha, beta;
    device::Images images;  // with a kernel_w other than 0: x are images, m their windows, x_stride from pixel to pixel
    int workers;            // thread blocks, or clusters of them
    int streamed;           // tiles that are cut along K (mm.cuh)
    uint64_t stream;
};

// Y[M, N] = epilogue(X[M, K] W[N, K]^T); throws std::runtime_error where the launch fails. Images: 16-bit operands, no
// "decode"; "mm_sm90" needs whole blocks of channels, and what device/launch.h's image_map takes.
void mm(const MmCall& call);

// A kernel of family "mm_t_sm90" makes Y = dX[M, K] of X = dY[M, N] by the fragments of W[N, K]: `n` is then K, and `k`
// N.

// values[N, pairs] of 16-bit pairs = dY[M, N]^T X[M, K] at the places of metadata[N, metadata_stride].
struct SddmmCall {
    int kernel, type;
    uint64_t dy, x, metadata, values, partials, counters;
    int64_t dy_stride, x_stride, metadata_stride;
    int m, n, k, pairs;
    int workers, streamed;
    uint64_t stream;
};

void sddmm(const SddmmCall& call);

// One pass over a weight from one of its forms to any others (pack.cuh); addresses that are 0 are not wanted.
struct RepackCall {
    int from;  // pack.cuh's From: 0 top2, 1 strict, 2 mask, 3 transposable, 4 sample, 5 canonical, 6 fragments
    int type, n, k;
    uint64_t dense, mask, values, metadata, fragments;
    int64_t dense_stride, mask_stride;  // elements
    uint64_t to_fragments, to_transposed, to_values, to_metadata, to_dense;
    int64_t to_dense_stride;
    uint64_t first;  // two 64-bit words, all ones before: the first crowded group of W, and of W^T
    uint64_t stream;
};

void repack(const RepackCall& call);

// Each family lists its kernels for one operand type (sparsekern/_ext.py's number) and runs one of them. They are
// compiled type by type: setup.py defines SK_TYPE.
template <int kType>
void list_mm_sm90(std::vector<KernelInfo>& to);
template <int kType>
void list_mm_sm80(std::vector<KernelInfo>& to);
template <int kType>
void list_decode(std::vector<KernelInfo>& to);
template <int kType>
void list_mm_sm90_promoting(std::vector<KernelInfo>& to);
template <int kType>
void run_mm_sm90(int index, const MmCall& call);
template <int kType>
int resident_mm_sm90(int index);
template <int kType>
void run_mm_sm80(int index, const MmCall& call);
template <int kType>
void run_decode(int index, const MmCall& call);
template <int kType>
void run_mm_sm90_promoting(int index, const MmCall& call);
template <int kType>
int resident_mm_sm90_promoting(int index);
template <int kType>
void list_gradients(std::vector<KernelInfo>& to);
template <int kType>
int resident_gradients(int index);
template <int kType>
void run_mm_t(int index, const MmCall& call);
template <int kType>
void run_sddmm(int index, const SddmmCall& call);  // the index among all gradients
template <int kType>
void run_repack(const RepackCall& call);

}  // namespace sk::sp24
