// Between row-major matrices and panels. A panel holds NT tokens side by side: element (k, token) lies at k * NT +
// token, so that one weight meets NT tokens in consecutive vectors. X panels are [K][NT], accumulator panels [n][NT].
#pragma once
#include <utility>

#include "epilogue.h"
#include "vec.h"

SK_ISA_BEGIN

// Swaps, for every pair of rows that lie Step apart, the lanes that a transposition moves between them.
template <int Step, size_t... I>
inline void transpose_pair(Vf& a, Vf& b, std::index_sequence<I...>) {
#if defined(__clang__)
    const Vf low = __builtin_shufflevector(a, b, (int(I) & Step ? kLanes + int(I) - Step : int(I))...);
    const Vf high = __builtin_shufflevector(a, b, (int(I) & Step ? kLanes + int(I) : int(I) + Step)...);
#else
    const Vf low = __builtin_shuffle(a, b, Vi{(int(I) & Step ? kLanes + int(I) - Step : int(I))...});
    const Vf high = __builtin_shuffle(a, b, Vi{(int(I) & Step ? kLanes + int(I) : int(I) + Step)...});
#endif
    a = low, b = high;
}

template <int Step = kLanes / 2>
inline void transpose(Vf (&r)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Step)) transpose_pair<Step>(r[i], r[i + Step], std::make_index_sequence<kLanes>{});
    if constexpr (Step > 1) transpose<Step / 2>(r);
}

// The first `count` elements at p as floats, zeros after them; never reads past them.
template <Dtype T>
inline Vf vf_load_part(const void* p, int count) {
    if (count >= kLanes) return vf_load_as<T>(p);
#if SK_LEVEL >= SK_AVX512
    const __mmask16 mask = __mmask16((1u << (count < 0 ? 0 : count)) - 1);
    if constexpr (T == Dtype::f32) return (Vf)_mm512_maskz_loadu_ps(mask, p);
    if constexpr (T == Dtype::bf16)
        return (Vf)(__builtin_convertvector((Vh)_mm256_maskz_loadu_epi16(mask, p), Vi) << 16);
    if constexpr (T == Dtype::f16) return (Vf)_mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, p));
#endif
    alignas(64) char part[sizeof(Vf)] = {};
    if (count > 0) __builtin_memcpy(part, p, size_t(count) * size_of(T));
    return vf_load_as<T>(part);
}

template <Dtype T>
inline void vf_store_part(void* p, Vf v, int count) {
    if (count >= kLanes) return vf_store_as<T>(p, v);
#if SK_LEVEL >= SK_AVX512
    if constexpr (T == Dtype::f32)
        return _mm512_mask_storeu_ps(p, __mmask16((1u << (count < 0 ? 0 : count)) - 1), (__m512)v);
#endif
    alignas(64) char part[sizeof(Vf)];
    vf_store_as<T>(part, v);
    if (count > 0) __builtin_memcpy(p, part, size_t(count) * size_of(T));
}

// Lane i of the result is the sum over the lanes of r[i]: the transposition above with an addition in every round.
template <int Step = kLanes / 2>
inline Vf sum_rows(Vf (&r)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < Step; ++i) {
        transpose_pair<Step>(r[i], r[i + Step], std::make_index_sequence<kLanes>{});
        r[i] += r[i + Step];
    }
    if constexpr (Step > 1) return sum_rows<Step / 2>(r);
    return r[0];
}

// panel[k][t] = x[t][k] for t < tokens, zero for tokens <= t < nt; k < count. nt is a multiple of kLanes.
template <Dtype T>
void pack_panel(const void* x, int64_t ldx, int tokens, int64_t count, int nt, float* panel) {
    const char* rows = static_cast<const char*>(x);
    const int64_t stride = ldx * size_of(T);
    // Tokens outside: kLanes rows at a time are read along, as streams; all rows at once would be a page each.
    for (int t = 0; t < nt; t += kLanes) {
        const int ts = tokens - t;
        for (int64_t k = 0; k < count; k += kLanes) {
            const int ks = int(count - k < kLanes ? count - k : kLanes);
            float* out = panel + k * nt + t;
            const char* in = rows + t * stride + k * size_of(T);
            Vf r[kLanes];
            if (ts >= kLanes && ks == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) r[i] = vf_load_as<T>(in + i * stride);
            } else {
                for (int i = 0; i < kLanes; ++i) r[i] = i < ts ? vf_load_part<T>(in + i * stride, ks) : Vf{};
            }
            if (ts > 0) transpose(r);
            if (ks == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) vf_store(out + i * nt, r[i]);
            } else {
                for (int i = 0; i < ks; ++i) vf_store(out + i * nt, r[i]);
            }
        }
    }
}

// y[t][n] = act(scale[n] * panel[n][t] + bias[n]) for t < tokens, n < count; y, scale and bias begin at n = 0.
template <Dtype T, Act A>
void unpack_panel_act(const float* panel, int nt, int tokens, int64_t count, const Epilogue& e, void* y, int64_t ldy) {
    char* rows = static_cast<char*>(y);
    const int64_t stride = ldy * size_of(T);
    for (int t = 0; t < tokens; t += kLanes) {
        const int ts = tokens - t < kLanes ? tokens - t : kLanes;
        for (int64_t n = 0; n < count; n += kLanes) {
            const int ns = int(count - n < kLanes ? count - n : kLanes);
            const Vf scale = e.scale ? vf_load_part<Dtype::f32>(e.scale + n, ns) : vf_set(1.0f);
            const Vf bias = e.bias ? vf_load_bias(e.bias, e.bias_dtype, n, ns) : Vf{};
            const float* in = panel + n * nt + t;
            char* out = rows + t * stride + n * size_of(T);
            Vf r[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) r[i] = i < ns ? vf_load(in + i * nt) : Vf{};
            transpose(r);
            if (e.scale) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) r[i] = r[i] * scale + bias;
            } else if (e.bias) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) r[i] = r[i] + bias;
            }
            if (ts == kLanes && ns == kLanes) {
                for (int i = 0; i < kLanes; ++i) vf_store_as<T>(out + i * stride, vf_act<A>(r[i]));
            } else {
                for (int i = 0; i < ts; ++i) vf_store_part<T>(out + i * stride, vf_act<A>(r[i]), ns);
            }
        }
    }
}

template <Dtype T>
void unpack_panel(const float* panel, int nt, int tokens, int64_t count, const Epilogue& e, void* y, int64_t ldy) {
    dispatch_act(e.act, [&]<Act A>() { unpack_panel_act<T, A>(panel, nt, tokens, count, e, y, ldy); });
}

// The epilogue of output columns n0.. of one whose first column is 0.
inline Epilogue epilogue_from(const Epilogue& e, int64_t n0) {
    return {e.scale ? e.scale + n0 : nullptr,
            e.bias ? static_cast<const char*>(e.bias) + n0 * size_of(e.bias_dtype) : nullptr, e.bias_dtype, e.act};
}

SK_ISA_END
