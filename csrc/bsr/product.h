// The drivers of mm and mm_t, and what they have in common.
#pragma once
#include "walk.h"

SK_ISA_BEGIN

void product_vector(const Product& p);
// mm of a few tokens: lanes along the contraction.
bool dot_suits(const Product& p);
void product_dot(const Product& p);
#if SK_LEVEL >= SK_AMX
bool tiles_suit(const Product& p);
void product_tiles(const Product& p);
#endif

// Writes c[outs][nt] (float, or int32 in the integer modes) to columns n0.. of tokens m0.. of y.
inline void finish(const Product& p, float* c, int nt, int64_t m0, int64_t tokens, int64_t n0, int64_t outs) {
    if (outs <= 0) return;
    if (p.mode == Mode::i8 || p.mode == Mode::i16) {
        for (int64_t i = 0; i < outs * nt; i += kLanes) {
            Vi sums;
            __builtin_memcpy(&sums, c + i, sizeof sums);
            vf_store(c + i, __builtin_convertvector(sums, Vf));
        }
    }
    const Epilogue e = epilogue_from(p.epilogue, n0);
    dispatch_float(p.y.dtype, [&]<Dtype T>() { unpack_panel<T>(c, nt, int(tokens), outs, e, p.y_at(m0, n0), p.y.ld); });
}

// Calls body(first group, end group, first panel, end panel) so that all groups meet all panels: parts of equal numbers
// of blocks, and panels apart where there are too few groups for the threads.
template <class Body>
inline void for_each_part(const Product& p, int64_t panels, Body&& body) {
    const int64_t groups = p.groups();
    if (p.threads <= 1) return body(int64_t(0), groups, int64_t(0), panels);
    const int64_t wanted = p.threads * 4, parts = groups < wanted ? groups : wanted;
    const int64_t splits = parts >= wanted ? 1 : panels < wanted / parts ? panels : wanted / parts;
    parallel_for(parts * splits, p.threads, [&](int64_t task) {
        const int64_t part = task / splits, s = task % splits;
        body(split_groups(p.start, groups, part, parts), split_groups(p.start, groups, part + 1, parts),
             panels * s / splits, panels * (s + 1) / splits);
    });
}

SK_ISA_END
