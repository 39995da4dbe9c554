// What happens to an accumulator before it becomes an output: scale, bias, activation, at vector speed.
//
// The activations keep a relative error near 1e-6 far into their tails (gelu_tanh 1e-5 where it has fallen to 1e-20):
// gelu is written with the upper tail of the normal distribution instead of 1 + erf, and gelu_tanh with a sigmoid
// instead of 1 + tanh, because those sums cancel for negative inputs.
#pragma once
#include "vec.h"

SK_ISA_BEGIN

// exp(hi + lo), lo small beside hi. Overflows to infinity, keeps NaN, and stays at exp(-87) = 1.6e-38 below -87:
// no caller can tell that from zero, and subnormals cost a hundred cycles each.
inline Vf vf_exp(Vf hi, Vf lo) {
    hi = hi > 89.0f ? vf_set(89.0f) : hi;
    hi = hi < -87.0f ? vf_set(-87.0f) : hi;
    const Vf magic = vf_set(0x1.8p23f);  // adding it rounds to an integer that sits in the low mantissa bits
    const Vf shifted = hi * 0x1.715476p0f + magic;
    const Vf n = shifted - magic;
    const Vf r = (hi - n * 0x1.62e4p-1f) + (lo - n * 0x1.7f7d1cp-20f);  // ln 2 in two parts, the first one short
    Vf p = vf_set(0x1.6a2448p-10f);
    p = p * r + 0x1.1239d4p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, because n reaches 128.
    const Vi i = (Vi)shifted - (Vi)magic;
    const Vi half = i >> 1;
    return p * (Vf)((half + 127) << 23) * (Vf)((i - half + 127) << 23);
}
inline Vf vf_exp(Vf x) { return vf_exp(x, Vf{}); }

// Q(t) = P(N(0, 1) > t) for t >= 0, relative error below 1e-6: exp(-t^2 / 2) times a polynomial in (t - 3) / (t + 3).
inline Vf vf_normal_tail(Vf t) {
    const Vi beyond = t > 12.9f;  // Q(12.9) is 2e-38, the last normal floats: zero from here on
    t = beyond ? vf_set(12.9f) : t;
    const Vf u = (t - 3.0f) / (t + 3.0f);
    Vf p = vf_set(0x1.bdf36ap-15f);
    p = p * u + 0x1.e2672ep-14f;
    p = p * u + -0x1.637afp-12f;
    p = p * u + -0x1.01c36p-10f;
    p = p * u + 0x1.7caf1p-9f;
    p = p * u + 0x1.91dcecp-8f;
    p = p * u + -0x1.7a943cp-5f;
    p = p * u + 0x1.f8bad2p-4f;
    p = p * u + -0x1.a6b66ap-3f;
    p = p * u + 0x1.f1b89cp-4f;
    // t = top + rest with top * top exact: the rounding of t * t would be multiplied by up to 100.
    const Vf top = (Vf)((Vi)t & ~0xfff);
    const Vf q = vf_exp(top * top * -0.5f, (t - top) * (t + top) * -0.5f) * p;
    return beyond ? Vf{} : q;
}

template <Act A>
inline Vf vf_act(Vf x) {
    if constexpr (A == Act::relu) return x < 0.0f ? Vf{} : x;  // NaN stays
    if constexpr (A == Act::gelu) {
        const Vf t = (Vf)((Vi)x & 0x7fffffff);
        const Vf q = vf_normal_tail(t);
        return x * (x < 0.0f ? q : 1.0f - q);
    }
    // 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u)).
    if constexpr (A == Act::gelu_tanh) return x / (1.0f + vf_exp(x * (x * x * -0x1.2444f2p-4f - 0x1.988454p0f)));
    if constexpr (A == Act::silu) return x / (1.0f + vf_exp(-x));
    return x;
}

inline Vf vf_act(Act act, Vf x) {
    switch (act) {
        case Act::relu: return vf_act<Act::relu>(x);
        case Act::gelu: return vf_act<Act::gelu>(x);
        case Act::gelu_tanh: return vf_act<Act::gelu_tanh>(x);
        case Act::silu: return vf_act<Act::silu>(x);
        default: return x;
    }
}

// Calls f.template operator()<A>() for the run-time activation, for loops that should not test it every time.
template <class F>
inline auto dispatch_act(Act act, F&& f) {
    switch (act) {
        case Act::relu: return f.template operator()<Act::relu>();
        case Act::gelu: return f.template operator()<Act::gelu>();
        case Act::gelu_tanh: return f.template operator()<Act::gelu_tanh>();
        case Act::silu: return f.template operator()<Act::silu>();
        default: return f.template operator()<Act::none>();
    }
}

// Element i.. of a bias of any type as floats; `count` < kLanes reads only that many (the rest is zero).
inline Vf vf_load_bias(const void* bias, Dtype type, int64_t i, int count) {
    return dispatch_float(type, [&]<Dtype T>() -> Vf {
        const char* p = static_cast<const char*>(bias) + i * size_of(T);
        if (count >= kLanes) return vf_load_as<T>(p);
        alignas(64) char part[sizeof(Vf)] = {};
        __builtin_memcpy(part, p, size_t(count) * size_of(T));
        return vf_load_as<T>(part);
    });
}

SK_ISA_END
