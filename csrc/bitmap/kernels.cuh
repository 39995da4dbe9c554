// The entries of bitmap on NVIDIA GPUs, and the lists of its kernels. No CUDA header: bindings and tests include it.
#pragma once
#include <cstdint>
#include <vector>

namespace sk::bitmap {

// MmSm80<tokens, warps, stages> and MmSm90<tokens, groups, stages>, each for bf16 and fp16. A kernel's number is its
// place, those of sm_90a first; of those that fit, the first one that has enough tokens is taken. The last ones of sm80
// are for blocks of less than 100 KB of shared memory.
#define SK_BITMAP_MM_SM90(X) X(8, 2, 4) X(16, 2, 4) X(32, 2, 4) X(64, 4, 3)
#define SK_BITMAP_MM_SM80(X) X(8, 8, 4) X(16, 8, 4) X(32, 8, 2) X(64, 4, 3) X(16, 4, 3) X(32, 4, 2) X(64, 2, 2)

struct KernelInfo {
    const char* order;                // of the records: "sm90" (only there) or "sm80"
    int rows, tokens, blocks, least;  // blocks: of an SM, where shared memory allows; least: K blocks of a share
    int shared_bytes, shared_more;    // without any record; for each byte of the longest record
};

std::vector<KernelInfo> kernels(int type);

struct MmCall {
    int kernel, type;
    uint64_t records, offsets, x, y, x_scale, bias, residual, partials, counters, stream;
    int64_t x_stride, y_stride, residual_stride;
    int m, n, k, longest;  // longest: bytes of a record
    int out_type, bias_type, activation, workers;
    float beta;
};

struct ExpandCall {
    int type;
    uint64_t values, bits, offsets, dense, stream;
    int n, k;
};

// Y[M, N] = act(x_scale * X[M, K] W[N, K]^T + bias) + beta * residual. All throw std::runtime_error where the launch
// fails.
void mm(const MmCall& call);
void to_dense(const ExpandCall& call);
void from_dense(const ExpandCall& call);

}  // namespace sk::bitmap
