// The sp24 kernels for one instruction set (see core/isa.h).
#include "host.h"

#include "../core/decode.h"
#include "host_parts.h"

SK_ISA_BEGIN
namespace {

// Values stay dense, activations are selected: for float math, and int8 values.
template <Dtype T, bool Exact>
struct PickRows {
    const Sp24& w;
    const float* x;
    int64_t ldx;

    template <int R, int M>
    void run(int64_t row, int64_t token, float* out, int64_t ld) const {
        constexpr int kMeta = kLanes / 4;  // bytes of metadata in a chunk
        const int64_t stored = w.groups() * 2, chunks = stored / kLanes, rest = stored % kLanes;
        const char* v[R];
        const uint8_t* meta[R];
        const float* xs[M];
        Vf acc[R][M];
        for (int r = 0; r < R; ++r) {
            v[r] = static_cast<const char*>(w.values) + (row + r) * stored * size_of(T);
            meta[r] = w.meta + (row + r) * (stored / 4);
            for (int m = 0; m < M; ++m) acc[r][m] = Vf{};
        }
        for (int m = 0; m < M; ++m) xs[m] = x + (token + m) * ldx;
        [[maybe_unused]] Exactly<R, M> exact;
        const int64_t next_rows = R * stored * size_of(T), next_meta = R * (stored / 4);

        auto step = [&](int64_t c, int r, uint32_t bits, const void* values) {
            const Picks pick(bits);
            const Vf f = vf_load_as<T>(values);
            for (int m = 0; m < M; ++m) acc[r][m] += f * pick(xs[m] + c * kChunk);
        };
        for (int64_t c = 0; c < chunks; ++c) {
            for (int r = 0; r < R; ++r) {
                const char* at = v[r] + c * (kLanes * size_of(T));
                const uint8_t* bits = meta[r] + c * kMeta;
                prefetch(at + next_rows);
                if (c % (64 / kMeta) == 0) prefetch(bits + next_meta);
                step(c, r, load_bits(bits, kMeta), at);
            }
            if constexpr (Exact)
                if (c % 512 == 511) exact.take(acc);
        }
        if (rest) {
            alignas(64) char part[kLanes * 4] = {};
            for (int r = 0; r < R; ++r) {
                __builtin_memcpy(part, v[r] + chunks * (kLanes * size_of(T)), size_t(rest * size_of(T)));
                step(chunks, r, load_bits(meta[r] + chunks * kMeta, rest / 4), part);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[m * ld + r] = Exact ? exact.total(acc, r, m) : vf_total(acc[r][m]);
    }

    // int8 x int8: every product is below 2^15 and every lane's sum of 512 of them an exact float.
    template <int R, int M>
    struct Exactly {
        int64_t sum[R][M] = {};
        void take(Vf (&acc)[R][M]) {
            for (int r = 0; r < R; ++r)
                for (int m = 0; m < M; ++m) {
                    for (int i = 0; i < kLanes; ++i) sum[r][m] += int64_t(acc[r][m][i]);
                    acc[r][m] = Vf{};
                }
        }
        float total(Vf (&acc)[R][M], int r, int m) {
            int64_t s = sum[r][m];
            for (int i = 0; i < kLanes; ++i) s += int64_t(acc[r][m][i]);
            return float(s);
        }
    };
};

#if SK_LEVEL >= SK_AVX512_BF16
// bf16: the same with a dot instruction, 64 weights a step.
struct PickDotRows {
    const Sp24& w;
    const uint16_t* x;
    int64_t ldx;

    template <int R, int M>
    void run(int64_t row, int64_t token, float* out, int64_t ld) const {
        const int64_t stored = w.groups() * 2, metas = stored / 4, chunks = stored / 32, rest = stored % 32;
        const uint16_t* v = static_cast<const uint16_t*>(w.values) + row * stored;
        const uint8_t* meta = w.meta + row * metas;
        const uint16_t* xs = x + token * ldx;
        __m512 acc[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
        auto step = [&](int64_t c, int r, uint64_t bits, __m512i values) {
            const PicksBf16 pick(bits);
            for (int m = 0; m < M; ++m)
                acc[r][m] = _mm512_dpbf16_ps(acc[r][m], (__m512bh)values, pick(xs + m * ldx + c * 64));
        };
        for (int64_t c = 0; c < chunks; ++c)
            for (int r = 0; r < R; ++r) {
                const uint16_t* at = v + r * stored + c * 32;
                const uint8_t* bits = meta + r * metas + c * 8;
                prefetch(at + R * stored);
                if (c % 8 == 0) prefetch(bits + R * metas);
                uint64_t word;
                __builtin_memcpy(&word, bits, 8);
                step(c, r, word, _mm512_loadu_si512(at));
            }
        if (rest)
            for (int r = 0; r < R; ++r) {
                uint64_t word = 0;
                __builtin_memcpy(&word, meta + r * metas + chunks * 8, size_t(rest / 4));
                const __mmask32 some = (1u << rest) - 1;
                step(chunks, r, word, _mm512_maskz_loadu_epi16(some, v + r * stored + chunks * 32));
            }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[m * ld + r] = _mm512_reduce_add_ps(acc[r][m]);
    }
};
#endif

template <Dtype T>
void mm_picked(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    const int64_t width = (w.k + 63) / 64 * 64;
    const float* floats = floats_of(x, width, 0);
    const int64_t work = w.n * w.k / 2;
    if constexpr (T == Dtype::i8)
        if (x.dtype == Dtype::i8) return decode(PickRows<T, true>{w, floats, width}, w.n, y, e, work, threads);
    decode(PickRows<T, false>{w, floats, width}, w.n, y, e, work, threads);
}

// Tokens from which panels are faster than picking.
constexpr int64_t kPanelTokens = kLanes + 1;

// Tokens from which tiles are faster than anything else: the more planes, the later. Measured at 4096 x 4096 and, bf16,
// at 8192 x 8192.
[[maybe_unused]] int64_t tile_tokens(const Sp24& w, const Dense& x) {
    if (w.dtype == Dtype::f32 || x.dtype == Dtype::f32) return 15;
    if (w.dtype == Dtype::f16 || x.dtype == Dtype::f16) return 10;
    return w.dtype == Dtype::bf16 ? 4 : 6;
}

void mm(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
#if SK_LEVEL >= SK_AMX
    if (x.rows >= tile_tokens(w, x) && sp24_mm_tiles(w, x, y, e, threads)) return;
#endif
    if (x.rows >= kPanelTokens) return sp24_mm_panels(w, x, y, e, threads);
#if SK_LEVEL >= SK_AVX512_BF16
    if (w.dtype == Dtype::bf16) {
        const int64_t width = (w.k + 63) / 64 * 64;
        const PickDotRows kernel{w, static_cast<const uint16_t*>(padded_rows(x, width, 0)), width};
        return decode(kernel, w.n, y, e, w.n * w.k / 2, threads);
    }
#endif
    switch (w.dtype) {
        case Dtype::f32: return mm_picked<Dtype::f32>(w, x, y, e, threads);
        case Dtype::bf16: return mm_picked<Dtype::bf16>(w, x, y, e, threads);
        case Dtype::f16: return mm_picked<Dtype::f16>(w, x, y, e, threads);
        case Dtype::i8: return mm_picked<Dtype::i8>(w, x, y, e, threads);
    }
}

// Dense bf16, for the benches: the same driver with nothing to expand.
struct DenseRows {
    const uint16_t* w;
    int64_t ldw, k;
    const void* x;
    int64_t ldx;

    template <int R, int M>
    void run(int64_t row, int64_t token, float* out, int64_t ld) const {
#if SK_LEVEL >= SK_AVX512_BF16
        __m512 acc[R][M];
        for (auto& a : acc)
            for (auto& b : a) b = _mm512_setzero_ps();
        const uint16_t* xs = static_cast<const uint16_t*>(x) + token * ldx;
        for (int64_t i = 0; i < k; i += 32) {
            const __mmask32 some = k - i >= 32 ? ~0u : (1u << (k - i)) - 1;
            for (int r = 0; r < R; ++r) {
                const uint16_t* p = w + (row + r) * ldw + i;
                prefetch(p + R * ldw);
                const __m512bh f = (__m512bh)_mm512_maskz_loadu_epi16(some, p);
                for (int m = 0; m < M; ++m)
                    acc[r][m] = _mm512_dpbf16_ps(acc[r][m], f, (__m512bh)_mm512_loadu_si512(xs + m * ldx + i));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) out[m * ld + r] = _mm512_reduce_add_ps(acc[r][m]);
#else
        const float* xs = static_cast<const float*>(x) + token * ldx;
        Vf acc[R][M] = {};
        const int64_t whole = k / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes)
            for (int r = 0; r < R; ++r) {
                const Vf f = vf_load_as<Dtype::bf16>(w + (row + r) * ldw + i);
                for (int m = 0; m < M; ++m) acc[r][m] += f * vf_load(xs + m * ldx + i);
            }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) {
                float s = vf_total(acc[r][m]);
                for (int64_t i = whole; i < k; ++i) s += bf16_to_f32(w[(row + r) * ldw + i]) * xs[m * ldx + i];
                out[m * ld + r] = s;
            }
#endif
    }
};

void dense_gemv(const Dense& w, const Dense& x, const Dense& y, int threads) {
    const int64_t width = (w.cols + 63) / 64 * 64;
    const void* xs = SK_LEVEL >= SK_AVX512_BF16 ? padded_rows(x, width, 0) : floats_of(x, width, 0);
    const DenseRows kernel{static_cast<const uint16_t*>(w.data), w.ld, w.cols, xs, width};
    decode(kernel, w.rows, y, Epilogue{nullptr, nullptr, Dtype::f32, Act::none}, w.rows * w.cols, threads);
}

}  // namespace

extern const Sp24Kernels sp24_kernels = {
    .mm = mm,
    .pack = sp24_pack,
    .pack_top2 = sp24_pack_top2,
    .unpack = sp24_unpack,
    .columns = sp24_columns,
    .check = sp24_check,
    .dense_gemv = dense_gemv,
};

SK_ISA_END
