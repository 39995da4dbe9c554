// The entries of bitmap on NVIDIA GPUs, and the list of its kernels. No CUDA header: bindings and tests include it.
#pragma once
#include <cstdint>
#include <vector>

namespace sk::bitmap {

// MmTile<tokens, warps, stages>, each for bf16 and fp16; a kernel's number is its place. The last one is for cards
// whose blocks have less than 100 KB of shared memory.
#define SK_BITMAP_MM(X) X(8, 8, 4) X(16, 8, 4) X(32, 8, 2) X(64, 4, 3) X(16, 4, 3)

struct KernelInfo {
    int tokens, warps, blocks;      // blocks: of an SM, where shared memory allows
    int shared_bytes, shared_more;  // without any record; for each byte of the longest record
};

std::vector<KernelInfo> kernels(int type);

struct MmCall {
    int kernel, type;
    uint64_t records, offsets, x, y, bias, partials, counters, stream;
    int64_t x_stride, y_stride;
    int m, n, k, longest;  // longest: bytes of a record
    int bias_type, activation, workers;
};

struct ExpandCall {
    int type;
    uint64_t values, bits, offsets, dense, stream;
    int n, k;
};

// Y[M, N] = act(X[M, K] W[N, K]^T + bias). All throw std::runtime_error where the launch fails.
void mm(const MmCall& call);
void to_dense(const ExpandCall& call);
void from_dense(const ExpandCall& call);

}  // namespace sk::bitmap
