// bitmap on AMX tiles, see core/expand_tiles.h.
#include "../core/expand_tiles.h"
#include "host.h"
#include "host_parts.h"

SK_ISA_BEGIN
#if SK_LEVEL >= SK_AMX
namespace {

template <Dtype T>
struct Expander {
    static constexpr int kPlanes = planes_of(T);
    static constexpr int64_t kSteps = kPlanes == 3 ? 4 : 16 / kPlanes, kSize = size_of(T);
    static constexpr int64_t kStepBytes = 16 * kSize;  // where half is stored
    const Bitmap& w;

    struct Rows {
        const Bitmap& w;
        int64_t row;
        const char* next[kMostRows];  // of every row, the value that its next strip begins with

        template <int64_t kCount, bool kAsk>
        bool expand(int64_t r, int64_t step, char* tiles) {
            const int64_t row_bytes = w.row_bytes(), at = step * 4;
            const uint8_t* bits = w.bits + (row + r) * row_bytes + at;
            const char* v = next[r];
            const char* end = static_cast<const char*>(w.values) + w.offsets[w.n] * kSize;
            bool fits = true;
            if (kAsk && at % 64 == 0) prefetch_near(bits + 64);
            // Unrolled, the conversions of several planes are slower (by a third at 64 tokens of half).
            if (kPlanes == 1 && at + kCount * 4 <= row_bytes && v + kCount * 32 * kSize <= end) {
                for (int64_t s = 0; s < kCount; ++s) {
                    if constexpr (kAsk) ask_ahead<kCount>(v, s, kStepBytes);
                    const uint32_t mask = load_bits(bits + s * 4);
                    fits &= put(mask, v, tiles + s * kPlanes * 2 * kTile);
                    v += __builtin_popcount(mask) * kSize;
                }
            } else {
                for (int64_t s = 0; s < kCount; ++s) {
                    if constexpr (kAsk) ask_ahead<kCount>(v, s, kStepBytes);
                    const uint32_t mask = load_bits(bits + s * 4, most(0, row_bytes - at - s * 4));
                    const int stored = __builtin_popcount(mask);
                    if (v + 32 * kSize <= end) {
                        fits &= put(mask, v, tiles + s * kPlanes * 2 * kTile);
                    } else {  // nothing behind the last value may be read
                        alignas(64) char part[32 * kSize] = {};
                        if (stored) __builtin_memcpy(part, v, size_t(stored * kSize));
                        fits &= put(mask, part, tiles + s * kPlanes * 2 * kTile);
                    }
                    v += stored * kSize;
                }
            }
            next[r] = v;
            return fits;
        }

        static bool put(uint32_t mask, const char* v, char* to) {
            if constexpr (T == Dtype::bf16) {
                _mm512_store_si512(to, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(v)));
                return true;
            } else {
                const Pair f = sk::SK_ISA::expand<T>(mask, v);
                __m512 low = (__m512)f.low, high = (__m512)f.high;
                const bool fits = !beyond_bf16(low) && !beyond_bf16(high);
                for (int q = 0; q < kPlanes; ++q) _mm512_store_si512(to + q * 2 * kTile, take_plane(low, high));
                return fits;
            }
        }

        void ask(int64_t r, int64_t step) const {
            const char* v = step ? next[r] : static_cast<const char*>(w.values) + w.offsets[row + r] * kSize;
            for (int64_t i = 0; i < kWideSteps * kStepBytes; i += 64) prefetch(v + i);
            prefetch(w.bits + (row + r) * w.row_bytes() + step * 4);
        }
    };

    Rows rows(int64_t row, int64_t count) const {
        Rows state{w, row, {}};
        for (int64_t r = 0; r < count; ++r)
            state.next[r] = static_cast<const char*>(w.values) + w.offsets[row + r] * kSize;
        return state;
    }
};

}  // namespace

bool bitmap_mm_tiles(const Bitmap& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    return dispatch_float(w.dtype,
                          [&]<Dtype T>() { return tile_mm<Expander<T>, T>({w}, w.n, x, y, e, w.n * w.k, threads); });
}
#endif
SK_ISA_END
