// Between dense matrices and blocks, and the column-order index.
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/parallel.h"
#include "host.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kSerialBytes = int64_t(1) << 20;

// Every bit of an element that makes it nonzero: -0.0 is zero, NaN is not.
inline uint64_t significant(Dtype t) {
    switch (t) {
        case Dtype::f32: return 0x7fffffff7fffffffull;
        case Dtype::i8: return ~0ull;
        default: return 0x7fff7fff7fff7fffull;
    }
}

inline bool any_nonzero(const char* p, int64_t bytes, uint64_t mask) {
    uint64_t found = 0, word;
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        uint64_t words[8];
        __builtin_memcpy(words, p + i, 64);
        for (int j = 0; j < 8; ++j) found |= words[j] & mask;
    }
    for (; i + 8 <= bytes; i += 8) {
        __builtin_memcpy(&word, p + i, 8);
        found |= word & mask;
    }
    if (i < bytes) {
        word = 0;
        __builtin_memcpy(&word, p + i, size_t(bytes - i));
        found |= word & mask;
    }
    return found != 0;
}

inline int threads_for(const BsrPack& a) { return a.rows * a.cols * size_of(a.dtype) < kSerialBytes ? 1 : a.threads; }

// body(block row) for all block rows, in runs that several threads share.
template <class Body>
void for_block_rows(const BsrPack& a, Body&& body) {
    const int threads = threads_for(a);
    const int64_t groups = a.grid_rows(), tasks = threads <= 1 ? 1 : groups < threads * 8 ? groups : threads * 8;
    parallel_for(tasks, threads, [&](int64_t task) {
        for (int64_t i = groups * task / tasks; i < groups * (task + 1) / tasks; ++i) body(i);
    });
}

inline int64_t part(int64_t total, int64_t block, int64_t size) {
    const int64_t left = total - block * size;
    return left < size ? left : size;
}

// copy(dense element, block element, bytes) for each row of each stored block; `rest` bytes of it lie over the edge.
template <class Copy>
void visit(const BsrPack& a, int64_t i, Copy&& copy) {
    const int64_t size = size_of(a.dtype), row_bytes = a.block_cols * size, ld = a.ld * size;
    for (int64_t r = 0; r < a.block_rows; ++r) {
        char* dense = static_cast<char*>(a.dense) + (i * a.block_rows + r) * ld;
        const bool exists = r < part(a.rows, i, a.block_rows);
        for (int64_t j = a.crow[i]; j < a.crow[i + 1]; ++j) {
            const int64_t bytes = exists ? part(a.cols, a.col[j], a.block_cols) * size : 0;
            char* block = static_cast<char*>(a.values) + (j * a.block_rows + r) * row_bytes;
            copy(bytes ? dense + a.col[j] * row_bytes : nullptr, block, bytes, row_bytes - bytes);
        }
    }
}

// Asks for huge pages under fresh memory: filling it faults 512 times less, and kernels that walk gigabytes of weights
// in blocks of a few kilobytes stop missing the TLB.
void advise_huge(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHuge = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace

void bsr_count(const BsrPack& a) {
    const int64_t size = size_of(a.dtype), grid_cols = a.grid_cols();
    const uint64_t mask = significant(a.dtype);
    for_block_rows(a, [&](int64_t i) {
        uint8_t* flags = a.flags + i * grid_cols;
        if (grid_cols) std::memset(flags, 0, size_t(grid_cols));  // memset(null, 0, 0) is undefined
        for (int64_t r = 0; r < part(a.rows, i, a.block_rows); ++r) {
            const char* row = static_cast<const char*>(a.dense) + (i * a.block_rows + r) * a.ld * size;
            for (int64_t c = 0; c < grid_cols; ++c)
                if (!flags[c])
                    flags[c] = any_nonzero(row + c * a.block_cols * size, part(a.cols, c, a.block_cols) * size, mask);
        }
        int32_t stored = 0;
        for (int64_t c = 0; c < grid_cols; ++c) stored += flags[c];
        a.crow[i + 1] = stored;
    });
    a.crow[0] = 0;
    for (int64_t i = 0; i < a.grid_rows(); ++i) a.crow[i + 1] += a.crow[i];
}

void bsr_fill(const BsrPack& a) {
    advise_huge(a.values, a.crow[a.grid_rows()] * a.block_rows * a.block_cols * size_of(a.dtype));
    for_block_rows(a, [&](int64_t i) {
        const uint8_t* flags = a.flags + i * a.grid_cols();
        int32_t* col = a.col + a.crow[i];
        for (int64_t c = 0; c < a.grid_cols(); ++c)
            if (flags[c]) *col++ = int32_t(c);
        visit(a, i, [](const char* dense, char* block, int64_t bytes, int64_t rest) {
            if (bytes) std::memcpy(block, dense, size_t(bytes));
            if (rest) std::memset(block + bytes, 0, size_t(rest));
        });
    });
}

void bsr_unpack(const BsrPack& a) {
    const int64_t row_bytes = a.cols * size_of(a.dtype), ld = a.ld * size_of(a.dtype);
    for_block_rows(a, [&](int64_t i) {
        for (int64_t r = 0; r < part(a.rows, i, a.block_rows); ++r)
            if (row_bytes) std::memset(static_cast<char*>(a.dense) + (i * a.block_rows + r) * ld, 0, size_t(row_bytes));
        visit(a, i, [](char* dense, const char* block, int64_t bytes, int64_t) {
            if (bytes) std::memcpy(dense, block, size_t(bytes));
        });
    });
}

void bsr_transpose_index(const BsrTransposeIndex& a) {
    std::vector<int32_t> next(size_t(a.grid_cols) + 1, 0);
    const int32_t blocks = a.crow[a.grid_rows];
    for (int32_t j = 0; j < blocks; ++j) ++next[size_t(a.col[j]) + 1];
    for (int64_t c = 0; c < a.grid_cols; ++c) next[size_t(c) + 1] += next[size_t(c)];
    std::memcpy(a.crow_t, next.data(), size_t(a.grid_cols + 1) * 4);
    for (int64_t i = 0; i < a.grid_rows; ++i) {
        for (int32_t j = a.crow[i]; j < a.crow[i + 1]; ++j) {
            const int32_t place = next[size_t(a.col[j])]++;
            a.row_t[place] = int32_t(i), a.gather_t[place] = j;
        }
    }
}

SK_ISA_END
