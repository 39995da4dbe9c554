// mm of 1..8 tokens: lanes along the contraction, so that a weight is read once, as wide as it lies, and converted in
// a register. Bound by memory where the weights are.
#include "product.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kMostTokens = 8;

struct Rows {
    const char* values;  // of the group's first block
    const int32_t* index;
    int64_t blocks, block_rows, block_cols;
    const float* x;
    int64_t ldx;
    float* c;  // [row][kLanes]: tokens side by side
};

// MT: as many tokens as accumulators; x has that many rows, those beyond the real ones are zero.
template <Dtype T, int MR, int MT>
void dot_rows(const Rows& a, int64_t r0) {
    const int64_t row_bytes = a.block_cols * size_of(T), block_bytes = a.block_rows * row_bytes;
    Vf acc[MR][MT] = {};
    for (int64_t j = 0; j < a.blocks; ++j) {
        const char* w = a.values + j * block_bytes + r0 * row_bytes;
        const float* x = a.x + a.index[j] * a.block_cols;
        for (int64_t k = 0; k < a.block_cols; k += kLanes) {
            Vf xv[MT];
#pragma GCC unroll 8
            for (int t = 0; t < MT; ++t) xv[t] = vf_load(x + t * a.ldx + k);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                const Vf weight = vf_load_as<T>(w + r * row_bytes + k * size_of(T));
#pragma GCC unroll 8
                for (int t = 0; t < MT; ++t) acc[r][t] += weight * xv[t];
            }
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int t = 0; t < MT; ++t) a.c[(r0 + r) * kLanes + t % kLanes] = sum_lanes(acc[r][t]);
}

template <Dtype T, int MT>
void dot_group(const Rows& a) {
    constexpr int kRegisters = SK_LEVEL >= SK_AVX512 ? 16 : 8;
    constexpr int kRows = kRegisters / MT > 8 ? 8 : kRegisters / MT;
    int64_t r = 0;
    for (; r + kRows <= a.block_rows; r += kRows) dot_rows<T, kRows, MT>(a, r);
    for (; r < a.block_rows; ++r) dot_rows<T, 1, MT>(a, r);
}

}  // namespace

bool dot_suits(const Product& p) {
    return !p.transposed && p.x.dtype != Dtype::i8 && p.tokens() <= (kLanes < kMostTokens ? kLanes : kMostTokens) &&
           p.w.block_cols % kLanes == 0;
}

void product_dot(const Product& p) {
    const int64_t tokens = p.tokens(), width = p.w.grid_cols() * p.w.block_cols;
    const int padded = tokens <= 2 ? int(tokens) : tokens <= 4 ? 4 : 8;
    const int64_t ldx = width + kLanes;  // no power of two: rows would share cache sets
    float* x = static_cast<float*>(scratch(0, size_t(padded * ldx * 4)));
    for (int64_t m = 0; m < padded; ++m) {
        const int64_t real = m < tokens ? p.x.cols : 0;
        if (real) widen(x + m * ldx, p.x_row(m), p.x.dtype, real);
        std::memset(x + m * ldx + real, 0, size_t((width - real) * 4));
    }
    const int64_t rows = p.w.block_rows, bytes = rows * p.w.block_cols * size_of(p.w.dtype);
    Product floats = p;
    floats.mode = Mode::f32;
    const auto run_group = [&](int64_t g) {
        float* c = static_cast<float*>(scratch(2, size_t(rows * kLanes * 4)));
        const Rows a{static_cast<const char*>(p.w.values) + p.start[g] * bytes,
                     p.index + p.start[g],
                     p.start[g + 1] - p.start[g],
                     rows,
                     p.w.block_cols,
                     x,
                     ldx,
                     c};
        const auto run = [&]<Dtype T>() {
            switch (padded) {
                case 1: return dot_group<T, 1>(a);
                case 2: return dot_group<T, 2>(a);
                case 4: return dot_group<T, 4>(a);
                default: return dot_group<T, 8>(a);
            }
        };
        if (p.w.dtype == Dtype::i8)
            run.template operator()<Dtype::i8>();
        else
            dispatch_float(p.w.dtype, run);
        const int64_t n0 = g * rows, left = p.total_outs() - n0;
        finish(floats, c, kLanes, 0, tokens, n0, left < rows ? left : rows);
    };
    for_each_part(p, 1, [&](int64_t g0, int64_t g1, int64_t, int64_t) {
        for (int64_t g = g0; g < g1; ++g) run_group(g);
    });
}

SK_ISA_END
