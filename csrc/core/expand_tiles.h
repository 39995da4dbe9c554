// Y = X W^T on AMX tiles: load as sparse, compute as dense. A strip of W is expanded into tiles in the first cache
// and multiplied with every token before the next one.
//
// Types wider than bf16 are split into planes, value = plane 0 + plane 1 + ..., each a bf16: float has three (24
// bits), half two, bf16 and int8 one. Products of planes (i, j) with i + j below the number of planes are added in
// float, what is left out is below the rounding of the type. The bf16 range is that of float, so nothing overflows;
// a residue below 1e-38 is lost (inputs below about 1e-33 are less exact). Planes of an infinity would meet the zeros
// of the other side, so a call that meets one says so, and its caller takes another kernel. 2:4 saves no
// multiplications here; the tiles are so much faster than vectors that this is still the fastest way, float included.
#pragma once
#include "amx.h"
#include "decode.h"
#include "panel.h"
#include "parallel.h"

#if SK_LEVEL >= SK_AMX
SK_ISA_BEGIN

inline constexpr int planes_of(Dtype t) { return t == Dtype::f32 ? 3 : t == Dtype::f16 ? 2 : 1; }

// Two vectors of 16 floats -> the next plane of 32 bf16; what remains stays in them.
inline __m512i take_plane(__m512& low, __m512& high) {
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    auto wide = [](__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); };
    low = _mm512_sub_ps(low, wide(_mm512_castsi512_si256(h)));
    high = _mm512_sub_ps(high, wide(_mm512_extracti64x4_epi64(h, 1)));
    return h;
}

// True where a lane is infinite, NaN, or would round to infinity as bf16.
inline bool beyond_bf16(__m512 v) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000)) != 0;
}

inline constexpr int64_t kTile = 1024;       // bytes
inline constexpr int64_t kSubRows = 32;      // rows of W expanded at a time: two tiles
inline constexpr int64_t kMostRows = 128;    // rows of a task: their sums and a strip of X fit the second cache
inline constexpr int64_t kGroup = 32;        // tokens multiplied at a time: two tiles
inline constexpr int64_t kWideSteps = 16;    // 64-byte steps of K that one visit to a row of W expands
inline constexpr int64_t kFewSteps = 4;      // the same where few tokens follow: both strips stay in the first cache
inline constexpr int64_t kTileTokens = 512;  // tokens packed at a time

// X in tile order. A tile is 16 dwords of K by `width` tokens; a strip of `deep` such steps holds, for every half group
// (16 tokens) and plane, its tiles one after the other. Strips are outermost: what a strip of W meets is contiguous.
struct TileX {
    char* data;
    int64_t steps, deep, halves, width;
    int planes;
    char* at(int64_t half, int plane, int64_t step) const {
        return data + (((step / deep * halves + half) * planes + plane) * deep + step % deep) * 64 * width;
    }
    int64_t bytes() const { return (steps + deep - 1) / deep * deep * halves * planes * 64 * width; }
};

// Packs tokens [16 half, ...) of x. Returns false where a value does not split into planes.
template <Dtype T>
bool pack_tiles(const Dense& x, int64_t half, const TileX& to) {
    constexpr int kPlanes = planes_of(T);
    const int64_t first = half * 16, rows = least(16, x.rows - first), size = size_of(T),
                  each = 64 / (T == Dtype::i8 ? 1 : 2);
    const char* from = static_cast<const char*>(x.data) + first * x.ld * size;
    alignas(64) uint16_t part[kPlanes][16][512];
    bool fits = true;
    for (int64_t step = 0; step < to.steps; step += to.deep) {
        const int64_t k = step * each, some = least(to.deep * each, x.cols - k),
                      depth = least(to.deep, to.steps - step) * 16;
        if constexpr (kPlanes == 1) {
            pack_dwords(to.at(half, 0, step), from + k * size, x.ld * size, int(rows), some * size, depth,
                        int(to.width));
        } else {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < some; i += 32) {
                    const char* p = from + (r * x.ld + k + i) * size;
                    __m512 low = (__m512)vf_load_part<T>(p, int(least(16, some - i)));
                    __m512 high = (__m512)vf_load_part<T>(p + 16 * size, int(least(16, some - i - 16)));
                    fits &= !beyond_bf16(low) && !beyond_bf16(high);
                    for (int q = 0; q < kPlanes; ++q) _mm512_store_si512(&part[q][r][i], take_plane(low, high));
                }
            for (int q = 0; q < kPlanes; ++q)
                pack_dwords(to.at(half, q, step), part[q], sizeof part[q][0], int(rows), some * 2, depth,
                            int(to.width));
        }
    }
    return fits;
}

// C += A B for one group over `steps` steps. a: [step][plane][two tiles]. C tiles 0..3, A 4 5, B 6 7.
template <int PW, int PX, bool Two, bool Int>
inline void tile_steps(const char* a, const TileX& x, int64_t half, int64_t step, int64_t steps) {
    constexpr int kMost = PW > PX ? PW : PX;
    const int64_t pitch = 4 * x.width, tile = 64 * x.width;
    const char* b = x.at(half, 0, step);
    for (int64_t s = 0; s < steps; ++s) {
        // Small planes first: their sum is exact for longer.
        for (int i = PW - 1; i >= 0; --i) {
            tile_load<4>(a + ((s * PW + i) * 2) * kTile, 64);
            tile_load<5>(a + ((s * PW + i) * 2 + 1) * kTile, 64);
            for (int j = least(PX, kMost - i) - 1; j >= 0; --j) {
                tile_load<6>(b + (j * x.deep + s) * tile, pitch);
                if constexpr (Two) tile_load<7>(b + ((PX + j) * x.deep + s) * tile, pitch);
                if constexpr (Int) {
                    tile_dp_i8<0, 4, 6>();
                    tile_dp_i8<2, 5, 6>();
                    if constexpr (Two) tile_dp_i8<1, 4, 7>(), tile_dp_i8<3, 5, 7>();
                } else {
                    tile_dp_bf16<0, 4, 6>();
                    tile_dp_bf16<2, 5, 6>();
                    if constexpr (Two) tile_dp_bf16<1, 4, 7>(), tile_dp_bf16<3, 5, 7>();
                }
            }
        }
    }
}

// C of one group: rows of 32 floats.
template <bool Two>
inline void tiles_begin(const float* c, bool first) {
    if (first) {
        tile_zero<0>(), tile_zero<2>();
        if constexpr (Two) tile_zero<1>(), tile_zero<3>();
    } else {
        tile_load<0>(c, 128), tile_load<2>(c + 16 * kGroup, 128);
        if constexpr (Two) tile_load<1>(c + 16, 128), tile_load<3>(c + 16 * kGroup + 16, 128);
    }
}
template <bool Two>
inline void tiles_end(float* c) {
    tile_store<0>(c, 128), tile_store<2>(c + 16 * kGroup, 128);
    if constexpr (Two) tile_store<1>(c + 16, 128), tile_store<3>(c + 16 * kGroup + 16, 128);
}

// Prefetches W where an expanding row will be two visits later, one line at a time: a burst would fill the few miss
// buffers of the first cache, and everything would wait. `bytes`: what a step reads, about.
template <int64_t kCount>
inline void ask_ahead(const char* v, int64_t s, int64_t bytes) {
    if (s * bytes % 64 < bytes) prefetch_near(v + 2 * kCount * bytes);
}

// Source: static constexpr int kPlanes (of W), kSteps (64-byte steps of K in a strip; kPlanes * kSteps <= 16, a divisor
// of kWideSteps and a multiple of kFewSteps); `Rows rows(row, count)`, whose expand<kCount, kAsk>(r, step, char* tiles)
// writes kCount steps of row r from `step` on, at tiles + (s * kPlanes + plane) * 2 * kTile for every step s, zeros
// behind the end, in ascending order of steps; false where a value does not split; with kAsk it asks ahead. Its
// ask(r, step) prefetches what the kWideSteps steps from there will read.
template <class Source, int PX, bool Two, bool Int>
struct TileBlock {
    static constexpr int PW = Source::kPlanes;
    static constexpr int64_t kSteps = Source::kSteps, kStrip = kSteps * PW * 2 * kTile;
    static constexpr int64_t kTogether = kWideSteps / kSteps;  // strips that one visit to a row expands
    const TileX& x;
    int64_t rows, groups;
    float* c;
    typename Source::Rows state;
    bool fits = true;

    int64_t subs() const { return (rows + kSubRows - 1) / kSubRows; }
    int64_t real(int64_t sub) const { return least(kSubRows, rows - sub * kSubRows); }
    float* sums(int64_t sub, int64_t g) const { return c + (g * subs() + sub) * kSubRows * kGroup; }

    // `strips` strips of kCount steps.
    template <int64_t kCount, bool kAsk>
    void expand(int64_t sub, int64_t step, int64_t strips, char* a) {
        constexpr int64_t kBytes = kCount * PW * 2 * kTile;
        const int64_t count = real(sub);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t i = 0; i < strips && step + i * kCount < x.steps; ++i)
                fits &= state.template expand<kCount, kAsk>(sub * kSubRows + r, step + i * kCount,
                                                            a + i * kBytes + r / 16 * kTile + r % 16 * 64);
        if (count == kSubRows) return;
        for (int64_t t = 0; t < strips * kCount * PW; ++t)
            for (int64_t r = count; r < kSubRows; ++r)
                _mm512_store_si512(a + t * 2 * kTile + r / 16 * kTile + r % 16 * 64, _mm512_setzero_si512());
    }

    // Few tokens: the sums stay in their tiles while all of K passes.
    void one_group(char* a) {
        for (int64_t sub = 0; sub < subs(); ++sub) {
            tiles_begin<Two>(nullptr, true);
            for (int64_t step = 0; step < x.steps; step += kFewSteps) {
                expand<kFewSteps, true>(sub, step, 1, a);
                tile_steps<PW, PX, Two, Int>(a, x, 0, step, least(kFewSteps, x.steps - step));
            }
            tiles_end<Two>(sums(sub, 0));
        }
    }

    // Many tokens: all rows of the block, expanded, meet a strip of X, which stays in the second cache, before the
    // next.
    void many_groups(char* a) {
        for (int64_t wide = 0; wide < x.steps; wide += kWideSteps) {
            for (int64_t sub = 0; sub < subs(); ++sub)
                expand<kSteps, false>(sub, wide, kTogether, a + sub * kTogether * kStrip);
            for (int64_t i = 0; i < kTogether && wide + i * kSteps < x.steps; ++i)
                for (int64_t sub = 0; sub < subs(); ++sub) {
                    const int64_t step = wide + i * kSteps;
                    // The memory fetches the next piece of W while the tiles multiply.
                    if (i == kTogether - 1 && wide + kWideSteps < x.steps)
                        for (int64_t r = 0; r < real(sub); ++r) state.ask(sub * kSubRows + r, wide + kWideSteps);
                    for (int64_t g = 0; g < groups; ++g) {
                        tiles_begin<Two>(sums(sub, g), step == 0);
                        tile_steps<PW, PX, Two, Int>(a + (sub * kTogether + i) * kStrip, x, 2 * g, step,
                                                     least(kSteps, x.steps - step));
                        tiles_end<Two>(sums(sub, g));
                    }
                }
        }
    }
};

template <class Source, int PX, bool Two, bool Int>
bool tile_block(const Source& source, int64_t row, int64_t rows, const TileX& x, int64_t groups, float* c) {
    using Block = TileBlock<Source, PX, Two, Int>;
    Block block{x, rows, groups, c, source.rows(row, rows)};
    const int64_t strips = groups == 1 ? 1 : Block::kTogether * block.subs();
    char* a = static_cast<char*>(scratch(2, size_t(strips * Block::kStrip)));
    groups == 1 ? block.one_group(a) : block.many_groups(a);
    return block.fits;
}

// Y of at most kTileTokens tokens; false where a value does not split into planes (y is then undefined).
template <class Source, Dtype X>
bool tile_mm_slab(const Source& source, int64_t n, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    constexpr bool kInt = X == Dtype::i8;
    constexpr int PX = planes_of(X);
    const int64_t m = x.rows, steps = (x.cols * (kInt ? 1 : 2) + 63) / 64;
    const int64_t groups = (m + kGroup - 1) / kGroup, halves = m <= 16 ? 1 : groups * 2;
    const int64_t width = m <= 16 ? m : 16;
    TileX tx{nullptr, steps, Source::kSteps, halves, width, PX};
    tx.data = static_cast<char*>(scratch(0, size_t(most(1, tx.bytes()))));
    bool fits = true;
    parallel_for(halves, threads, [&](int64_t half) {
        if (!pack_tiles<X>(x, half, tx)) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
    });
    if (!fits) return false;
    const int64_t block = most(kSubRows, least(kMostRows, n / (most(1, threads) * 8) / kSubRows * kSubRows));
    TileConfig config;
    for (int t = 0; t < 4; ++t) config.tile(t, 16, int(4 * width));
    config.tile(4, 16, 64).tile(5, 16, 64).tile(6, 16, int(4 * width)).tile(7, 16, int(4 * width));
    parallel_for((n + block - 1) / block, threads, [&](int64_t task) {
        const int64_t row = task * block, rows = least(block, n - row);
        const int64_t padded = (rows + kSubRows - 1) / kSubRows * kSubRows;
        float* c = static_cast<float*>(scratch(1, size_t(groups * padded * kGroup) * 4));
        {
            TileScope scope(config);
            const bool good = m <= 16 ? tile_block<Source, PX, false, kInt>(source, row, rows, tx, groups, c)
                                      : tile_block<Source, PX, true, kInt>(source, row, rows, tx, groups, c);
            if (!good) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
        }
        if constexpr (kInt)
            for (int64_t i = 0; i < groups * padded * kGroup; i += 16)
                _mm512_storeu_ps(c + i, _mm512_cvtepi32_ps(_mm512_loadu_si512(c + i)));
        for (int64_t g = 0; g < groups; ++g)
            dispatch_float(y.dtype, [&]<Dtype Y>() {
                char* to = static_cast<char*>(y.data) + (g * kGroup * y.ld + row) * size_of(Y);
                unpack_panel<Y>(c + g * padded * kGroup, kGroup, int(least(kGroup, m - g * kGroup)), rows,
                                epilogue_from(e, row), to, y.ld);
            });
    });
    return fits;
}

template <class Source, Dtype X>
bool tile_mm(const Source& source, int64_t n, const Dense& x, const Dense& y, const Epilogue& e, int64_t work,
             int threads) {
    if (x.cols == 0) return false;  // nothing would write the sums
    if (work * x.rows < kThreadWork) threads = 1;
    for (int64_t token = 0; token < x.rows; token += kTileTokens) {
        const int64_t tokens = least(kTileTokens, x.rows - token);
        const Dense xs{static_cast<char*>(x.data) + token * x.ld * size_of(x.dtype), x.dtype, tokens, x.cols, x.ld};
        const Dense ys{static_cast<char*>(y.data) + token * y.ld * size_of(y.dtype), y.dtype, tokens, y.cols, y.ld};
        if (!tile_mm_slab<Source, X>(source, n, xs, ys, e, threads)) return false;
    }
    return true;
}

SK_ISA_END
#endif
