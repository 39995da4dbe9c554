// mm and mm_t on AMX tiles: bf16, and int8 by int8.
#include "product.h"
#include "tiles.h"

#if SK_LEVEL >= SK_AMX
SK_ISA_BEGIN
namespace {

constexpr int64_t kChunkBytes = int64_t(1) << 20;     // packed tokens that stay in L2 while all weights pass by
constexpr int64_t kSegmentBytes = int64_t(16) << 10;  // weights that stay in L1 while a chunk of tokens passes by
constexpr int kTile = 16;

// How a call is cut: `tiles` tiles of 16 tokens, `chunk` of them packed at a time.
struct Chunks {
    int64_t tiles, chunk, tile_bytes;
};

Chunks cut(const Product& p, int64_t tile_bytes) {
    const int64_t tiles = ceil_div(p.tokens(), kTile), fit = kChunkBytes / (tile_bytes ? tile_bytes : 1);
    const int64_t most = fit < 2 ? 2 : fit, count = ceil_div(tiles, most), even = ceil_div(tiles, count);
    return {tiles, count > 1 ? even + even % 2 : even, tile_bytes};
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens of a chunk that begins at token m0, as pack(tile, first dword, dwords) tasks.
template <class Pack>
void pack_chunk(const Product& p, int64_t tiles, int64_t unit, Pack&& pack) {
    const int64_t depth = p.panel_depth(), part = ceil_div(1024, unit) * unit, parts = ceil_div(depth, part);
    parallel_for(tiles * parts, p.threads, [&](int64_t task) {
        const int64_t k0 = task % parts * part;
        pack(task / parts, k0, least(part, depth - k0));
    });
}

// ------------------------------------------------------------------------------------------------------------ mm

struct MmShape {
    int rows;         // of an A tile
    int64_t a_tiles;  // in a block
    int depth;        // dwords of a step
    int64_t steps;    // in a block
    int width;        // tokens in a B tile
    const float *scale, *bias;
};

// 32 features of 16 tokens, c[feature][token] floats, as bf16 rows of y: whole cache lines, because a half of one
// would be fetched twice. bias and scale are floats, padded to whole blocks; null where there are none.
template <Act A>
void finish_lines(const float* c, const float* scale, const float* bias, int64_t features, int64_t tokens, char* y,
                  int64_t y_row) {
    // After vcvtne2ps2bf16 the low half holds one feature, the high half the next: the words of a token side by side.
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_load_si512(kPairs);
    const auto row = [&](int64_t f) {
        Vf v = vf_load(c + f * kTile);
        if (scale) v = v * scale[f];
        if (bias) v = v + bias[f];
        return (__m512)vf_act<A>(v);
    };
    __m512i r[16];
    if (features > 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            r[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(row(2 * i + 1), row(2 * i)));
    } else {
        for (int i = 0; i < 8; ++i)
            r[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(row(2 * i + 1), row(2 * i)));
        for (int i = 8; i < 16; ++i) r[i] = _mm512_setzero_si512();
    }
    transpose_dwords(r);
    if (features >= 32 && tokens >= 16) {
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) _mm512_storeu_si512(y + t * y_row, r[t]);
    } else {
        const __mmask32 valid = features >= 32 ? ~__mmask32(0) : (__mmask32(1) << features) - 1;
        for (int t = 0; t < 16; ++t)
            if (t < tokens) _mm512_mask_storeu_epi16(y + t * y_row, valid, r[t]);
    }
}

// c: per token tile [rows][16].
void finish_bf16(const Product& p, const float* scale, const float* bias, const float* c, int64_t rows, int64_t tiles,
                 int64_t m0, int64_t n0, int64_t real) {
    dispatch_act(p.epilogue.act, [&]<Act A>() {
        for (int64_t t = 0; t < tiles; ++t, c += rows * kTile, m0 += kTile)
            for (int64_t f = 0; f < real; f += 32)
                finish_lines<A>(c + f * kTile, scale ? scale + n0 + f : nullptr, bias ? bias + n0 + f : nullptr,
                                real - f, p.tokens() - m0, p.y_at(m0, n0 + f), p.y.ld * 2);
    });
}

void mm_finish(const Product& p, const MmShape& s, float* c, int64_t rows, int64_t tiles, int64_t m0, int64_t n0,
               int64_t real) {
    if (p.y.dtype == Dtype::bf16) return finish_bf16(p, s.scale, s.bias, c, rows, tiles, m0, n0, real);
    for (int64_t t = 0; t < tiles; ++t, c += rows * kTile, m0 += kTile)
        finish(p, c, kTile, m0, least(kTile, p.tokens() - m0), n0, real);
}

// Blocks j0 .. j1 of MA row tiles from tile i on against NB token tiles; c: per token tile [rows][16], read back where
// j0 > 0. Meanwhile `ahead` lines of what lies `distance` bytes behind each block are fetched into L2.
template <class Dot, int MA, int NB>
void mm_strip(const Walk& w, const MmShape& s, int64_t i, int64_t j0, int64_t j1, const char* b, int64_t b_next,
              float* c, int64_t distance, int64_t ahead) {
    const int64_t b_row = s.width * 4, a_next = s.rows * w.a_row;
    const int64_t c_down = int64_t(s.rows) * kTile * 4, c_right = c_down * MA, c_row = kTile * 4;
    if (j0 == 0)
        tiles_zero<MA, NB>();
    else
        tiles_load<MA, NB>(c, c_down, c_right, c_row);
    const int64_t a_row = w.a_row, a_block = w.a_block, a_step = s.depth * 4, b_step = s.depth * b_row;
    const int64_t steps = s.steps, x_block = steps * b_step;
    const int32_t* index = w.index;
    const char* block = w.a + j0 * a_block + i * a_next;
    for (int64_t j = j0; j < j1; ++j, block += a_block) {
        const char *a = block, *x = b + index[j] * x_block;
        for (int64_t l = 0; l < ahead; ++l) prefetch_l2(a + distance + l * 64);
        for (int64_t k = 0; k < steps; ++k, a += a_step, x += b_step)
            tile_step<Dot, MA, NB>(a, a_next, a_row, x, b_next, b_row);
    }
    tiles_store<MA, NB>(c, c_down, c_right, c_row);
}

// A result that waits to be written. It waits until the next tiles are under way: writing it is vector work that hides
// behind theirs, but would stall on the last products of its own.
struct Pending {
    float* c = nullptr;
    int64_t rows, tiles, m0, n0, real;

    void flush(const Product& p, const MmShape& s) {
        if (c) mm_finish(p, s, c, rows, tiles, m0, n0, real);
        c = nullptr;
    }
};

// Groups g0 .. g1 against token tiles t0 .. t1 of the chunk that begins at tile `first`. Operands from L2 feed the
// tiles at a third of their speed, so a segment of the weights that fits L1 meets all tokens before the next one, its
// sums kept in c.
template <class Dot>
void mm_groups(const Product& p, const MmShape& s, int64_t g0, int64_t g1, const char* packed, int64_t tile_bytes,
               int64_t first, int64_t t0, int64_t t1) {
    const int64_t tiles = t1 - t0, most = tiles == 1 ? 4 : 2;
    const int64_t c_size = tiles * least(most, s.a_tiles) * s.rows * kTile + 1024;
    float* c = static_cast<float*>(scratch(2, size_t(2 * c_size) * sizeof(float)));
    int64_t side = 0;  // strips take turns between two buffers, because one may still be pending
    Pending pending;
    for (int64_t g = g0; g < g1; ++g) {
        const Walk w = walk_group(p, g, 1);
        for (int64_t i = 0; i < s.a_tiles; side ^= 1) {
            const int64_t ma = least(s.a_tiles - i, most), rows = ma * s.rows, step = ma == 3 ? 1 : 4 / ma;
            const int64_t fit = kSegmentBytes / (rows * w.a_row), turns = ceil_div(tiles, step);
            const int64_t wanted = ma == 1 || turns == 1 ? 1 : ceil_div(w.blocks, fit < 1 ? 1 : fit);
            const int64_t segments = wanted < 1 ? 1 : wanted;
            const int64_t distance = w.blocks * w.a_block,
                          ahead = turns == 1 ? 0 : ceil_div(rows * w.a_row, 64 * turns);
            const int64_t n0 = g * p.outs() + i * s.rows, real = least(rows, p.total_outs() - n0);
            for (int64_t segment = 0; segment < segments; ++segment) {
                const int64_t j0 = w.blocks * segment / segments, j1 = w.blocks * (segment + 1) / segments;
                for (int64_t t = t0; t < t1; t += step) {
                    const int64_t nb = least(t1 - t, step);
                    float* ct = c + side * c_size + (t - t0) * rows * kTile;
                    dispatch_tiles(int(ma), int(nb), [&]<int MA, int NB>() {
                        mm_strip<Dot, MA, NB>(w, s, i, j0, j1, packed + t * tile_bytes, tile_bytes, ct,
                                              distance + (t - t0) / step * ahead * 64, ahead);
                    });
                    pending.flush(p, s);
                    if (segment + 1 == segments) pending = {ct, rows, nb, (first + t) * kTile, n0, real};
                }
            }
            i += ma;
        }
    }
    pending.flush(p, s);
}

void mm_tiles(const Product& p) {
    MmShape s{};
    s.rows = tile_part(p.outs()), s.a_tiles = p.outs() / s.rows;
    s.depth = tile_part(p.depth()), s.steps = p.depth() / s.depth;
    for (s.width = 1; s.width < kTile && s.width < p.tokens();) s.width *= 2;
    const int64_t outs = p.total_outs();
    float* epilogue = static_cast<float*>(scratch(3, size_t(2 * outs + 64) * sizeof(float)));
    if (p.epilogue.scale) s.scale = epilogue, std::memcpy(epilogue, p.epilogue.scale, size_t(outs) * 4);
    if (p.epilogue.bias) {
        s.bias = epilogue + outs + 32;
        widen(epilogue + outs + 32, p.epilogue.bias, p.epilogue.bias_dtype, outs);
    }
    const TileConfig config = tile_config(s.rows, s.depth, s.width);
    const Chunks c = cut(p, p.panel_depth() * s.width * 4);
    const int64_t size = size_of(p.x.dtype);
    for (int64_t first = 0; first < c.tiles; first += c.chunk) {
        const int64_t tiles = least(c.chunk, c.tiles - first);
        char* packed = static_cast<char*>(scratch(0, size_t(tiles * c.tile_bytes)));
        pack_chunk(p, tiles, kTile, [&](int64_t t, int64_t k0, int64_t count) {
            const int64_t m0 = (first + t) * kTile, e0 = k0 * p.per_dword, left = p.x.cols - e0;
            pack_dwords(packed + t * c.tile_bytes + k0 * s.width * 4, p.x_row(m0) + (left > 0 ? e0 * size : 0),
                        p.x.ld * size, int(least(kTile, p.tokens() - m0)), left * size, count, s.width);
        });
        for_each_part(p, tiles, [&](int64_t g0, int64_t g1, int64_t t0, int64_t t1) {
            if (t0 == t1) return;
            const TileScope scope(config);
            if (p.mode == Mode::i8)
                mm_groups<DotI8>(p, s, g0, g1, packed, c.tile_bytes, first, t0, t1);
            else
                mm_groups<DotBf16>(p, s, g0, g1, packed, c.tile_bytes, first, t0, t1);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------- mm_t

struct MmTShape {
    int tokens;       // in an A tile
    int depth;        // dwords of a step
    int64_t steps;    // in a block
    int cols;         // of a B tile
    int64_t b_tiles;  // in a block
};

template <int MA, int NB>
void mm_t_strip(const Walk& w, const MmTShape& s, int64_t i, const char* a, int64_t a_next, float* c) {
    const int64_t a_row = s.depth * 4, a_step = s.tokens * a_row, b_row = w.a_depth, b_next = s.cols * 4;
    const int64_t b_block = w.a_block, b_step = s.depth * b_row, steps = s.steps, blocks = w.blocks;
    const int32_t* index = w.index;
    const char* block = w.a + i * b_next;
    tiles_zero<MA, NB>();
    for (int64_t j = 0; j < blocks; ++j, block += b_block) {
        const char *x = a + index[j] * steps * a_step, *b = block;
        for (int64_t k = 0; k < steps; ++k, x += a_step, b += b_step)
            tile_step<DotBf16, MA, NB>(x, a_next, a_row, b, b_next, b_row);
    }
    tiles_store<MA, NB>(c, int64_t(s.tokens) * NB * b_next, b_next, NB * b_next);
}

void mm_t_group(const Product& p, const MmTShape& s, int64_t g, const char* packed, int64_t tile_bytes, int64_t first,
                int64_t t0, int64_t t1) {
    const Walk w = walk_group(p, g, 1);
    float* c = static_cast<float*>(scratch(2, 4 * kTile * kTile * sizeof(float)));
    for (int64_t i = 0; i < s.b_tiles;) {
        const int64_t nb = least(s.b_tiles - i, t1 - t0 == 1 ? 4 : 2);
        for (int64_t t = t0; t < t1;) {
            const int64_t ma = least(t1 - t, 4 / nb);
            dispatch_tiles(int(ma), int(nb), [&]<int MA, int NB>() {
                mm_t_strip<MA, NB>(w, s, i, packed + t * tile_bytes, tile_bytes, c);
            });
            const int64_t n0 = g * p.outs() + i * s.cols, m0 = (first + t) * kTile, pitch = nb * s.cols;
            const int64_t outs = least(pitch, p.total_outs() - n0), tokens = least(ma * kTile, p.tokens() - m0);
            for (int64_t m = 0; m < tokens && outs > 0; ++m) {
                char* out = p.y_at(m0 + m, n0);
                const float* in = c + m * pitch;
                int64_t k = 0;
                for (; k + kLanes <= outs; k += kLanes) vf_store_as<Dtype::bf16>(out + k * 2, vf_load(in + k));
                for (; k < outs; ++k) store_as<Dtype::bf16>(out, k, in[k]);
            }
            t += ma;
        }
        i += nb;
    }
}

// Tokens m0 .. m0 + count as A tiles: [step of the contraction][token][depth dwords].
void pack_rows(const Product& p, const MmTShape& s, int64_t m0, int64_t k0, int64_t count, char* packed) {
    const int64_t real = least(s.tokens, p.tokens() - m0), step = s.depth * 4;
    for (int64_t k = k0; k < k0 + count; k += s.depth) {
        const int64_t bytes = least(step, (p.x.cols - 2 * k) * 2);
        const __mmask64 whole = first_bytes(step), valid = first_bytes(bytes);
        char* out = packed + k * s.tokens * 4;
        for (int64_t m = 0; m < s.tokens; ++m) {
            const char* in = p.x_row(m0 + (m < real ? m : 0)) + (bytes > 0 ? k * 4 : 0);
            _mm512_mask_storeu_epi8(out + m * step, whole, _mm512_maskz_loadu_epi8(m < real ? valid : 0, in));
        }
    }
}

void mm_t_tiles(const Product& p) {
    MmTShape s{};
    s.tokens = int(least(p.tokens(), kTile));
    s.depth = tile_part(p.depth()), s.steps = p.depth() / s.depth;
    s.cols = tile_part(p.outs()), s.b_tiles = p.outs() / s.cols;
    const TileConfig config = tile_config(s.tokens, s.depth, s.cols);
    const Chunks c = cut(p, p.panel_depth() * s.tokens * 4);
    for (int64_t first = 0; first < c.tiles; first += c.chunk) {
        const int64_t tiles = least(c.chunk, c.tiles - first);
        char* packed = static_cast<char*>(scratch(0, size_t(tiles * c.tile_bytes)));
        pack_chunk(p, tiles, s.depth, [&](int64_t t, int64_t k0, int64_t count) {
            pack_rows(p, s, (first + t) * kTile, k0, count, packed + t * c.tile_bytes);
        });
        for_each_part(p, tiles, [&](int64_t g0, int64_t g1, int64_t t0, int64_t t1) {
            if (t0 == t1) return;
            const TileScope scope(config);
            for (int64_t g = g0; g < g1; ++g) mm_t_group(p, s, g, packed, c.tile_bytes, first, t0, t1);
        });
    }
}

}  // namespace

// Tiles pay from about a quarter of their rows and depth on.
bool tiles_suit(const Product& p) {
    if (p.mode != Mode::bf16 && p.mode != Mode::i8) return false;
    if (p.x.dtype != Dtype::i8 && p.w.dtype == Dtype::i8 && p.tokens() <= 4 && dot_suits(p)) return false;
    return tile_part(p.outs()) >= 4 && tile_part(p.depth()) >= 2;
}

void product_tiles(const Product& p) { p.transposed ? mm_t_tiles(p) : mm_tiles(p); }

SK_ISA_END
#endif
