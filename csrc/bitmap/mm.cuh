// What the bitmap_mm kernels are told, and how their sums leave: Y[M, N] = epilogue(X[M, K] W[N, K]^T), M <= 64.
//
// The records of the tiles lie in memory in the order (row block, K). The workers (thread blocks) take equal shares of
// the tiles, whatever rows they cut through, and the parts of several workers are added by add_parts.
#pragma once
#include "../device/epilogue.h"
#include "../device/parts.h"
#include "fragments.cuh"

namespace sk::bitmap {

struct Mm {
    const char* records;
    const int32_t* offsets;  // [row blocks * k blocks + 1], in kUnit bytes
    const char* x;
    char* y;
    int64_t x_stride, y_stride;  // elements from token to token
    int m, n, k;
    int row_blocks, k_blocks;  // of records
    int streamed;              // all tiles: see device/parts.h
    int x_align;               // 16, 8 or 4: bytes that divide every row's address and length
    int record_bytes;          // room for the longest record
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

constexpr int kSumRows = 64, kSumPitch = kSumRows + 4;  // floats from token to token of the sums: no bank conflicts

// D fragment `a` of 16 rows from `row` on into sums [token][row].
template <int kTokens>
SK_DEVICE void put_sums(float* sums, const float (&a)[kTokens / 2], int row, uint32_t lane) {
    SK_UNROLL
    for (int j = 0; j < kTokens / 2; ++j) {
        const int token = 8 * (j / 4) + 2 * (lane % 4) + j % 2;
        sums[token * kSumPitch + row + lane / 4 + j % 4 / 2 * 8] = a[j];
    }
}

// 64 rows of Y from row0 on, by kThreads threads: thread % 64 is the row. A loop, because an activation is much code.
template <int kThreads>
SK_DEVICE void store_sums(const Mm& p, const float* sums, int row0, uint32_t thread) {
    using namespace device;
    const int row = row0 + thread % kSumRows;
    const RowEpilogue r = row_epilogue(p.epilogue, row, row < p.n);
    SK_NO_UNROLL
    for (int token = thread / kSumRows; token < p.m; token += kThreads / kSumRows) {
        const float sum = sums[token * kSumPitch + thread % kSumRows];
        const float out = scale_and_shift(r, token_scale(p.epilogue, token, true), sum);
        if (row < p.n) store_one(p.epilogue, p.y, p.y_stride, token, row, out);
    }
}

}  // namespace sk::bitmap
