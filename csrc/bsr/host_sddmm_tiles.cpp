// sddmm on AMX tiles (bf16): A = dY^T with pairs of tokens side by side, B = X with pairs of tokens interleaved.
#include "sddmm.h"
#include "tiles.h"

#if SK_LEVEL >= SK_AMX
SK_ISA_BEGIN
namespace {

// How the tokens and the blocks fill tiles.
struct Shape {
    int depth;  // pairs of tokens in a step
    int64_t steps;
    int rows, cols;                // of a C tile
    int64_t row_tiles, col_tiles;  // in a block
};

// Tokens 2 * p0 .. of 16 columns as a vector of dwords, one per column: zero beyond rows and beyond `columns`.
inline __m512i load_pairs(const Dense& x, int64_t p0, int64_t column, int columns) {
    const int64_t real = x.cols - column < columns ? x.cols - column : columns;
    const __mmask16 mask = real <= 0 ? 0 : static_cast<__mmask16>((1u << real) - 1);
    const auto* base = static_cast<const uint16_t*>(x.data) + (real > 0 ? column : 0);
    const auto row = [&](int64_t m) {
        return m < x.rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, base + m * x.ld))
                          : _mm512_setzero_si512();
    };
    return _mm512_or_si512(row(2 * p0), _mm512_slli_epi32(row(2 * p0 + 1), 16));
}

// panel[tile][step][pair][column] of tiles t0 .. t1.
void pack_right(const Dense& x, const Shape& s, int64_t t0, int64_t t1, uint32_t* panel) {
    const __mmask16 whole = static_cast<__mmask16>((1u << s.cols) - 1);
    for (int64_t pair = 0; pair < s.steps * s.depth; ++pair)
        for (int64_t t = t0; t < t1; ++t)
            _mm512_mask_storeu_epi32(panel + (t * s.steps * s.depth + pair) * s.cols, whole,
                                     load_pairs(x, pair, t * s.cols, s.cols));
}

// panel[tile][step][column][pair] of tiles t0 .. t1.
void pack_left(const Dense& x, const Shape& s, int64_t t0, int64_t t1, uint32_t* panel) {
    const __mmask16 whole = static_cast<__mmask16>((1u << s.depth) - 1);
    for (int64_t step = 0; step < s.steps; ++step) {
        for (int64_t t = t0; t < t1; ++t) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = i < s.depth ? load_pairs(x, step * s.depth + i, t * s.rows, s.rows) : _mm512_setzero_si512();
            transpose_dwords(r);
            uint32_t* out = panel + (t * s.steps + step) * s.rows * s.depth;
            for (int i = 0; i < 16; ++i)
                if (i < s.rows) _mm512_mask_storeu_epi32(out + i * s.depth, whole, r[i]);
        }
    }
}

template <int MA, int NB>
void strip(const Shape& s, const char* a, const char* b, float* c, int64_t pitch) {
    const int64_t a_row = s.depth * 4, b_row = s.cols * 4, a_step = s.rows * a_row, b_step = s.depth * b_row;
    tiles_zero<MA, NB>();
    for (int64_t k = 0; k < s.steps; ++k)
        tile_step<DotBf16, MA, NB>(a + k * a_step, s.steps * a_step, a_row, b + k * b_step, s.steps * b_step, b_row);
    tiles_store<MA, NB>(c, s.rows * pitch * 4, b_row, pitch * 4);
}

}  // namespace

bool sddmm_tiles_suit(const Sddmm& s) {
    return s.args.w.dtype == Dtype::bf16 && tile_part(s.args.w.block_rows) >= 4 && tile_part(s.args.w.block_cols) >= 4;
}

void sddmm_tiles(const Sddmm& call) {
    const BsrSddmm& a = call.args;
    const int64_t pairs = ceil_div(a.x.rows, 2), rows = a.w.block_rows, cols = a.w.block_cols;
    Shape s{};
    s.depth = pairs < 16 ? int(pairs) : 16;
    s.depth = s.depth < 1 ? 1 : s.depth;
    s.steps = ceil_div(pairs, s.depth);
    s.rows = tile_part(rows), s.cols = tile_part(cols), s.row_tiles = rows / s.rows, s.col_tiles = cols / s.cols;
    const int64_t depth = s.steps * s.depth, left_size = a.w.grid_rows() * rows * depth;
    auto* left = static_cast<uint32_t*>(scratch(0, size_t(left_size + a.w.grid_cols() * cols * depth) * 4));
    uint32_t* right = left + left_size;
    call.pack(a.w.grid_rows() * s.row_tiles, s.rows, [&](int64_t t0, int64_t t1) { pack_left(a.dy, s, t0, t1, left); });
    call.pack(a.w.grid_cols() * s.col_tiles, s.cols,
              [&](int64_t t0, int64_t t1) { pack_right(a.x, s, t0, t1, right); });
    const TileConfig config = tile_config(s.rows, s.depth, s.cols);
    call.for_each_block([&](int64_t i, int64_t j) {
        const TileScope scope(config);
        float* c = static_cast<float*>(scratch(2, size_t(rows * cols * 4)));
        for (int64_t ti = 0; ti < s.row_tiles;) {
            const int64_t left_tiles = s.row_tiles - ti, ma = left_tiles < 2 || s.col_tiles == 1 ? 1 : 2;
            for (int64_t tj = 0; tj < s.col_tiles;) {
                const int64_t nb = s.col_tiles - tj < 2 ? 1 : 2;
                const char* l = reinterpret_cast<const char*>(left + (i * s.row_tiles + ti) * s.rows * depth);
                const char* r = reinterpret_cast<const char*>(right + (a.col[j] * s.col_tiles + tj) * s.cols * depth);
                dispatch_tiles(int(ma), int(nb), [&]<int MA, int NB>() {
                    strip<MA, NB>(s, l, r, c + ti * s.rows * cols + tj * s.cols, cols);
                });
                tj += nb;
            }
            ti += ma;
        }
        call.store(j, c, cols);
    });
}

SK_ISA_END
#endif
