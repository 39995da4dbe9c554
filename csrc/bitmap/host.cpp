// The bitmap kernels for one instruction set (see core/isa.h).
#include "host.h"

#include "../core/decode.h"
#include "host_parts.h"

SK_ISA_BEGIN
namespace {

// A row is safe where a whole vector may be read at its last value: the values of later rows follow. The others
// copy what they read.
inline bool safe(const Bitmap& w, int64_t last_row, int64_t most_read) {
    return w.offsets[last_row + 1] + most_read <= w.offsets[w.n];
}

// Rows in flight: where their bits and their next values are, and how far the same rows of the next group lie.
template <int R, int64_t kSize>
struct Streams {
    const uint8_t* bits[R];
    const char* v[R];
    int64_t ahead = 0;

    Streams(const Bitmap& w, int64_t row) {
        for (int r = 0; r < R; ++r) {
            bits[r] = w.bits + (row + r) * w.row_bytes();
            v[r] = static_cast<const char*>(w.values) + w.offsets[row + r] * kSize;
        }
        ahead = (w.offsets[row + R] - w.offsets[row]) * kSize;
    }
};

// Float math on expanded weights.
template <Dtype T>
struct FloatRows {
    const Bitmap& w;
    const float* x;
    int64_t ldx;

    template <int R, int M>
    void run(int64_t row, int64_t token, float* out, int64_t ld) const {
        safe(w, row + R - 1, kChunk) ? walk<R, M, false>(row, token, out, ld) : walk<R, M, true>(row, token, out, ld);
    }

    template <int R, int M, bool Careful>
    void walk(int64_t row, int64_t token, float* out, int64_t ld) const {
        constexpr int64_t kSize = size_of(T), kBits = kChunk / 8;
        Streams<R, kSize> s(w, row);
        const float* xs[M];
        Vf acc[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) acc[r][m] = Vf{};
        for (int m = 0; m < M; ++m) xs[m] = x + (token + m) * ldx;
        auto step = [&](int64_t c, int r, uint32_t mask) {
            const int64_t bytes = __builtin_popcount(mask) * kSize;
            const void* from = s.v[r];
            alignas(64) char part[kChunk * kSize];
            if constexpr (Careful)
                from = bytes ? __builtin_memcpy(part, from, size_t(bytes)) : part;  // from may be null then
            const Pair f = expand<T>(mask, from);
            s.v[r] += bytes;
            for (int m = 0; m < M; ++m) {
                acc[r][m] += f.low * vf_load(xs[m] + c * kChunk);
                acc[r][m] += f.high * vf_load(xs[m] + c * kChunk + kLanes);
            }
        };
        const int64_t chunks = w.k / kChunk;
        for (int64_t c = 0; c < chunks; ++c)
            for (int r = 0; r < R; ++r) {
                prefetch(s.v[r] + s.ahead);
                step(c, r, load_bits(s.bits[r] + c * kBits, kBits));
            }
        if (w.k % kChunk)
            for (int r = 0; r < R; ++r)
                step(chunks, r, load_bits(s.bits[r] + chunks * kBits, w.row_bytes() - chunks * kBits));
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[m * ld + r] = vf_total(acc[r][m]);
    }
};

#if SK_LEVEL >= SK_AVX512_BF16
// bf16: expand 32 weights, one dot instruction a token.
struct DotRows {
    const Bitmap& w;
    const uint16_t* x;
    int64_t ldx;

    template <int R, int M>
    void run(int64_t row, int64_t token, float* out, int64_t ld) const {
        safe(w, row + R - 1, 32) ? walk<R, M, false>(row, token, out, ld) : walk<R, M, true>(row, token, out, ld);
    }

    template <int R, int M, bool Careful>
    void walk(int64_t row, int64_t token, float* out, int64_t ld) const {
        Streams<R, 2> s(w, row);
        const uint16_t* xs[M];
        __m512 acc[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
        for (int m = 0; m < M; ++m) xs[m] = x + (token + m) * ldx;
        auto step = [&](int64_t c, int r, uint32_t mask) {
            const int stored = __builtin_popcount(mask);
            const __mmask32 some = Careful ? __mmask32((uint64_t(1) << stored) - 1) : ~0u;
            const __m512i values = Careful ? _mm512_maskz_loadu_epi16(some, s.v[r]) : _mm512_loadu_si512(s.v[r]);
            const __m512bh f = (__m512bh)_mm512_maskz_expand_epi16(mask, values);
            s.v[r] += 2 * stored;
            for (int m = 0; m < M; ++m)
                acc[r][m] = _mm512_dpbf16_ps(acc[r][m], f, (__m512bh)_mm512_loadu_si512(xs[m] + c * 32));
        };
        const int64_t chunks = w.k / 32;
        for (int64_t c = 0; c < chunks; ++c)
            for (int r = 0; r < R; ++r) {
                prefetch(s.v[r] + s.ahead);
                step(c, r, load_bits(s.bits[r] + c * 4));
            }
        if (w.k % 32)
            for (int r = 0; r < R; ++r) step(chunks, r, load_bits(s.bits[r] + chunks * 4, w.row_bytes() - chunks * 4));
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[m * ld + r] = _mm512_reduce_add_ps(acc[r][m]);
    }
};
#endif

// Tokens from which tiles are faster: the more planes, the later. Measured at 4096 x 4096 and 8192 x 8192.
[[maybe_unused]] int64_t tile_tokens(Dtype t) { return t == Dtype::f32 ? 18 : t == Dtype::f16 ? 15 : 2; }

void mm(const Bitmap& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
#if SK_LEVEL >= SK_AMX
    if (x.rows >= tile_tokens(w.dtype) && bitmap_mm_tiles(w, x, y, e, threads)) return;
#endif
    const int64_t work = w.n ? w.offsets[w.n] : 0, width = (w.k + 31) / 32 * 32;
#if SK_LEVEL >= SK_AVX512_BF16
    if (w.dtype == Dtype::bf16) {
        const DotRows kernel{w, static_cast<const uint16_t*>(padded_rows(x, width, 0)), width};
        return decode(kernel, w.n, y, e, work, threads);
    }
#endif
    const float* floats = floats_of(x, width, 0);
    dispatch_float(w.dtype, [&]<Dtype T>() { decode(FloatRows<T>{w, floats, width}, w.n, y, e, work, threads); });
}

}  // namespace

extern const BitmapKernels bitmap_kernels = {
    .mm = mm,
    .count = bitmap_count,
    .fill = bitmap_fill,
    .unpack = bitmap_unpack,
    .columns = bitmap_columns,
};

SK_ISA_END
