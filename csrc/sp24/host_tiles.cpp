// sp24 on AMX tiles, see core/expand_tiles.h.
#include "../core/expand_tiles.h"
#include "host.h"
#include "host_parts.h"

SK_ISA_BEGIN
#if SK_LEVEL >= SK_AMX
namespace {

// Expands rows of W. Quad: int8 tiles (64 weights a step), else bf16 tiles (32 weights a step).
template <Dtype T, bool Quad>
struct Expander {
    static constexpr int kPlanes = planes_of(T);
    static constexpr int64_t kSteps = Quad ? 8 : kPlanes == 3 ? 4 : 16 / kPlanes;  // at most 64 bytes of metadata
    static constexpr int64_t kMetaStep = Quad ? 8 : 4, kSize = size_of(T), kStepBytes = kMetaStep * 4 * kSize;
    const Sp24& w;

    struct Rows {
        const Sp24& w;
        int64_t row, metas;
        alignas(64) uint8_t masks[kMostRows][64];  // of every row, the bits of the metadata's present 64 bytes

        void ask(int64_t r, int64_t step) const {
            const int64_t at = (row + r) * metas + step * kMetaStep;
            const char* v = static_cast<const char*>(w.values) + at * 4 * kSize;
            for (int64_t i = 0; i < kWideSteps * kStepBytes; i += 64) prefetch(v + i);
            for (int64_t i = 0; i < kWideSteps * kMetaStep; i += 64) prefetch(w.meta + at + i);
        }

        template <int64_t kCount, bool kAsk>
        bool expand(int64_t r, int64_t step, char* tiles) {
            const int64_t at = step * kMetaStep, bytes = least(kCount * kMetaStep, metas - at);
            const char* v = static_cast<const char*>(w.values) + ((row + r) * metas + at) * 4 * kSize;
            if (at % 64 == 0) {
                const uint8_t* meta = w.meta + (row + r) * metas + at;
                if constexpr (kAsk) prefetch_near(meta + 64);
                sp24_masks(meta, least(64, metas - at), masks[r]);
            }
            const uint8_t* mask = masks[r] + at % 64;
            bool fits = true;
            for (int64_t s = 0; s < kCount; ++s) {
                if constexpr (kAsk) ask_ahead<kCount>(v + s * kStepBytes, s, kStepBytes);
                const int64_t left = bytes - s * kMetaStep;
                char* to = tiles + s * kPlanes * 2 * kTile;
                if (left >= kMetaStep) {
                    fits &= put(mask + s * kMetaStep, v + s * kStepBytes, to);
                } else {  // the end of the row: nothing behind it may be read
                    alignas(64) char part[kStepBytes] = {};
                    if (left > 0) __builtin_memcpy(part, v + s * kStepBytes, size_t(left * 4 * kSize));
                    fits &= put(mask + s * kMetaStep, part, to);
                }
            }
            return fits;
        }

        static bool put(const uint8_t* masks, const char* v, char* to) {
            if constexpr (Quad) {
                uint64_t mask;
                __builtin_memcpy(&mask, masks, 8);
                const __m512i values = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)v));
                _mm512_store_si512(to, _mm512_maskz_expand_epi8(mask, values));
                return true;
            } else {
                uint32_t mask;
                __builtin_memcpy(&mask, masks, 4);
                auto store = [&](int plane, __m256i values) {
                    _mm512_store_si512(to + plane * 2 * kTile,
                                       _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(values)));
                };
                if constexpr (T == Dtype::bf16) {
                    store(0, _mm256_loadu_si256((const __m256i*)v));
                    return true;
                } else {
                    __m512 rest = (__m512)vf_load_as<T>(v);
                    const bool fits = T == Dtype::i8 || !beyond_bf16(rest);
                    for (int q = 0; q < kPlanes; ++q) {
                        const __m256i h = (__m256i)_mm512_cvtneps_pbh(rest);
                        store(q, h);
                        rest =
                            _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
                    }
                    return fits;
                }
            }
        }
    };

    Rows rows(int64_t row, int64_t) const { return {w, row, w.groups() / 2, {}}; }
};

}  // namespace

bool sp24_mm_tiles(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    const int64_t work = w.n * w.k;
    switch (w.dtype) {
        case Dtype::f32: return tile_mm<Expander<Dtype::f32, false>, Dtype::f32>({w}, w.n, x, y, e, work, threads);
        case Dtype::bf16: return tile_mm<Expander<Dtype::bf16, false>, Dtype::bf16>({w}, w.n, x, y, e, work, threads);
        case Dtype::f16: return tile_mm<Expander<Dtype::f16, false>, Dtype::f16>({w}, w.n, x, y, e, work, threads);
        case Dtype::i8:
            if (x.dtype == Dtype::i8)
                return tile_mm<Expander<Dtype::i8, true>, Dtype::i8>({w}, w.n, x, y, e, work, threads);
            return dispatch_float(x.dtype, [&]<Dtype X>() {
                return tile_mm<Expander<Dtype::i8, false>, X>({w}, w.n, x, y, e, work, threads);
            });
    }
    return false;
}
#endif
SK_ISA_END
