// sddmm: dvalues[j] = the block of dy^T * x under block j, a contraction over tokens.
//
// Both operands are packed once per call, block row by block row and block column by block column, so that the loops
// meet contiguous floats (or bf16 pairs of two tokens) and edges are zero.
#include "sddmm.h"
#include "vector.h"

SK_ISA_BEGIN
namespace {

// ------------------------------------------------------------------------------ lanes along the columns of a block

// panel[b][t][i], i < pitch: dword i of block b of a row-major matrix; a dword is one float of token t or the bf16
// pair of tokens 2t, 2t + 1. Blocks b0 .. b1 of `size` columns each.
void pack_columns(const Dense& x, Mode mode, int64_t size, int64_t pitch, int64_t b0, int64_t b1, uint32_t* panel) {
    const int64_t bytes = size_of(x.dtype), step = mode == Mode::bf16 ? 2 : 1, depth = ceil_div(x.rows, step);
    for (int64_t t = 0; t < depth; ++t) {
        const char* row = static_cast<const char*>(x.data) + t * step * x.ld * bytes;
        for (int64_t b = b0; b < b1; ++b) {
            const int64_t left = x.cols - b * size, real = left < size ? left : size;
            uint32_t* out = panel + (b * depth + t) * pitch;
            const char* in = row + b * size * bytes;
            if (mode == Mode::bf16)
                interleave_rows(out, 0, in, x.ld * bytes, x.rows - 2 * t < 2 ? 1 : 2, real);
            else
                widen(reinterpret_cast<float*>(out), in, x.dtype, real);
            if (pitch > real) std::memset(out + real, 0, size_t((pitch - real) * 4));
        }
    }
}

template <class Op, int MR, int NV>
void columns_tile(const char* a, int64_t a_depth, const char* b, int64_t b_depth, int64_t depth, float* c,
                  int64_t ldc) {
    typename Op::Acc acc[MR][NV] = {};
    for (int64_t t = 0; t < depth; ++t, a += a_depth, b += b_depth) {
        typename Op::Vec bv[NV];
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) bv[v] = Op::load(b + v * sizeof(Vf));
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const typename Op::Vec av = Op::broadcast(a + 4 * r);
#pragma GCC unroll 3
            for (int v = 0; v < NV; ++v) Op::step(acc[r][v], av, bv[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) vf_store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <class Op, int NV>
void columns_strip(const char* a, int64_t rows, const char* b, int64_t pitch, int64_t depth, float* c) {
    int64_t r = 0;
    const auto run = [&]<int MR>() {
        for (; r + MR <= rows; r += MR)
            columns_tile<Op, MR, NV>(a + 4 * r, rows * 4, b, pitch * 4, depth, c + r * pitch, pitch);
    };
    run.template operator()<kRowsMax>();
    if constexpr (kRowsMax > 4) run.template operator()<4>();
    run.template operator()<2>();
    run.template operator()<1>();
}

// c[rows][pitch] of one block.
template <class Op>
void columns_block(const char* a, int64_t rows, const char* b, int64_t pitch, int64_t depth, float* c) {
    int64_t vectors = pitch / kLanes;
    while (vectors > 0) {  // 4 as 2 + 2, not 3 + 1
        const int64_t nv = vectors == 4 ? 2 : vectors < kVectorsMax ? vectors : kVectorsMax;
        if (nv == 1) columns_strip<Op, 1>(a, rows, b, pitch, depth, c);
        if (nv == 2) columns_strip<Op, 2>(a, rows, b, pitch, depth, c);
        if (nv == 3) columns_strip<Op, 3>(a, rows, b, pitch, depth, c);
        b += nv * sizeof(Vf), c += nv * kLanes, vectors -= nv;
    }
}

void sddmm_columns(const Sddmm& s, Mode mode) {
    const BsrSddmm& a = s.args;
    const int64_t rows = a.w.block_rows, cols = a.w.block_cols, pitch = ceil_div(cols, kLanes) * kLanes;
    const int64_t depth = mode == Mode::bf16 ? ceil_div(a.x.rows, 2) : a.x.rows;
    const int64_t grid_rows = a.w.grid_rows(), grid_cols = a.w.grid_cols(), left_size = grid_rows * depth * rows;
    uint32_t* left = static_cast<uint32_t*>(scratch(0, size_t((left_size + grid_cols * depth * pitch) * 4)));
    uint32_t* right = left + left_size;
    s.pack(grid_rows, rows, [&](int64_t b0, int64_t b1) { pack_columns(a.dy, mode, rows, rows, b0, b1, left); });
    s.pack(grid_cols, cols, [&](int64_t b0, int64_t b1) { pack_columns(a.x, mode, cols, pitch, b0, b1, right); });
    s.for_each_block([&](int64_t i, int64_t j) {
        float* c = static_cast<float*>(scratch(2, size_t(rows * pitch * 4)));
        const char* l = reinterpret_cast<const char*>(left + i * depth * rows);
        const char* r = reinterpret_cast<const char*>(right + a.col[j] * depth * pitch);
#if SK_LEVEL >= SK_AVX512_BF16
        if (mode == Mode::bf16)
            columns_block<OpBf16>(l, rows, r, pitch, depth, c);
        else
#endif
            columns_block<OpF32>(l, rows, r, pitch, depth, c);
        s.store(j, c, pitch);
    });
}

// ------------------------------------------------------------------------------------- lanes along the tokens

// c[r][c] = sum over tokens of a[r][t] * b[c][t].
template <int MR, int MC>
void tokens_tile(const float* a, const float* b, int64_t ld, float* c, int64_t ldc) {
    Vf acc[MR][MC] = {};
    for (int64_t t = 0; t < ld; t += kLanes) {
        Vf bv[MC];
#pragma GCC unroll 4
        for (int j = 0; j < MC; ++j) bv[j] = vf_load(b + j * ld + t);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
            const Vf av = vf_load(a + i * ld + t);
#pragma GCC unroll 4
            for (int j = 0; j < MC; ++j) acc[i][j] += av * bv[j];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < MC; ++j) c[i * ldc + j] = sum_lanes(acc[i][j]);
}

// Blocks much narrower than a vector.
void sddmm_tokens(const Sddmm& s) {
    const BsrSddmm& a = s.args;
    const int64_t rows = a.w.block_rows, cols = a.w.block_cols, ld = ceil_div(a.x.rows, kLanes) * kLanes;
    const int64_t grid_rows = a.w.grid_rows(), grid_cols = a.w.grid_cols();
    const int64_t left_size = grid_rows * rows * ld, right_size = grid_cols * cols * ld;
    float* left = static_cast<float*>(scratch(0, size_t((left_size + right_size) * 4)));
    float* right = left + left_size;
    const auto transpose_columns = [&](const Dense& x, int64_t size, int64_t b0, int64_t b1, float* panel) {
        const int64_t c0 = b0 * size, c1 = b1 * size < x.cols ? b1 * size : x.cols;
        dispatch_float(x.dtype, [&]<Dtype T>() {
            pack_panel<T>(static_cast<const char*>(x.data) + c0 * size_of(T), x.ld, int(x.rows), c1 - c0, int(ld),
                          panel + c0 * ld);
        });
        std::memset(panel + c1 * ld, 0, size_t((b1 * size - c1) * ld * 4));
    };
    s.pack(grid_rows, rows, [&](int64_t b0, int64_t b1) { transpose_columns(a.dy, rows, b0, b1, left); });
    s.pack(grid_cols, cols, [&](int64_t b0, int64_t b1) { transpose_columns(a.x, cols, b0, b1, right); });
    s.for_each_block([&](int64_t i, int64_t j) {
        float* c = static_cast<float*>(scratch(2, size_t(rows * cols * 4)));
        const float *l = left + i * rows * ld, *r = right + a.col[j] * cols * ld;
        const auto strip = [&]<int MR>(int64_t r0) {
            int64_t c0 = 0;
            const auto run = [&]<int MC>() {
                for (; c0 + MC <= cols; c0 += MC)
                    tokens_tile<MR, MC>(l + r0 * ld, r + c0 * ld, ld, c + r0 * cols + c0, cols);
            };
            run.template operator()<4>();
            run.template operator()<2>();
            run.template operator()<1>();
        };
        int64_t r0 = 0;
        for (; r0 + 2 <= rows; r0 += 2) strip.template operator()<2>(r0);
        for (; r0 < rows; ++r0) strip.template operator()<1>(r0);
        s.store(j, c, cols);
    });
}

}  // namespace

void bsr_sddmm(const BsrSddmm& a) {
    Sddmm s{a};
    if (s.blocks() == 0) return;
    if (s.blocks() * a.w.block_rows * a.w.block_cols * a.x.rows < kSerialWork) s.threads = 1;
#if SK_LEVEL >= SK_AMX
    if (sddmm_tiles_suit(s)) return sddmm_tiles(s);
#endif
    if (a.w.block_cols * 2 <= kLanes) return sddmm_tokens(s);
#if SK_LEVEL >= SK_AVX512_BF16
    if (a.x.dtype == Dtype::bf16) return sddmm_columns(s, Mode::bf16);
#endif
    sddmm_columns(s, Mode::f32);
}

SK_ISA_END
