// What the drivers of sddmm share.
#pragma once
#include "walk.h"

SK_ISA_BEGIN

struct Sddmm {
    const BsrSddmm& args;
    int threads = args.threads;

    int64_t blocks() const { return args.crow[args.w.grid_rows()]; }

    // body(first block, end block) over `count` blocks of `size` columns of an operand, in runs of a few kilobytes of
    // each row.
    template <class Body>
    void pack(int64_t count, int64_t size, Body&& body) const {
        const int64_t run = size < 512 ? 512 / size : 1, tasks = ceil_div(count, run);
        parallel_for(tasks, threads,
                     [&](int64_t task) { body(task * run, (task + 1) * run < count ? (task + 1) * run : count); });
    }

    // body(block row, block number) for every stored block.
    template <class Body>
    void for_each_block(Body&& body) const {
        const int64_t groups = args.w.grid_rows(), wanted = threads <= 1 ? 1 : threads * 4;
        const int64_t parts = groups < wanted ? groups : wanted;
        parallel_for(parts, threads, [&](int64_t task) {
            const int64_t g1 = split_groups(args.crow, groups, task + 1, parts, 0);
            for (int64_t g = split_groups(args.crow, groups, task, parts, 0); g < g1; ++g)
                for (int64_t j = args.crow[g]; j < args.crow[g + 1]; ++j) body(g, j);
        });
    }

    // Block j from c[R][pitch].
    void store(int64_t j, const float* c, int64_t pitch) const {
        const int64_t rows = args.w.block_rows, cols = args.w.block_cols;
        dispatch_float(args.w.dtype, [&]<Dtype T>() {
            char* out = static_cast<char*>(const_cast<void*>(args.w.values)) + j * rows * cols * size_of(T);
            for (int64_t r = 0; r < rows; ++r, out += cols * size_of(T)) {
                int64_t i = 0;
                for (; i + kLanes <= cols; i += kLanes)
                    vf_store_as<T>(out + i * size_of(T), vf_load(c + r * pitch + i));
                for (; i < cols; ++i) store_as<T>(out, i, c[r * pitch + i]);
            }
        });
    }
};

#if SK_LEVEL >= SK_AMX
bool sddmm_tiles_suit(const Sddmm& s);
void sddmm_tiles(const Sddmm& s);
#endif

SK_ISA_END
