// Element types in registers: pairs of 16-bit floats, quadruples of bytes, and their way from and to float.
#pragma once
#include "simt.h"

namespace sk::device {

// The numbers of sparsekern/_ext.py.
enum class Type : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, e4m3 = 4, i32 = 5 };
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

SK_ANYWHERE constexpr int bytes_of(Type t) {
    return t == Type::f32 || t == Type::i32 ? 4 : t == Type::bf16 || t == Type::f16 ? 2 : 1;
}
SK_ANYWHERE constexpr bool is_wide(Type t) { return bytes_of(t) == 2; }  // 16-bit operands of the tensor cores

// What a product of two operands of this type is summed in.
template <Type T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<Type::i8> {
    using type = int32_t;
};
template <Type T>
using Accumulator = typename AccumulatorOf<T>::type;

struct alignas(16) Vec4 {
    uint32_t x, y, z, w;
};

// Division by a number that the host knows, in one multiplication, of numbers below 2^31.
struct Divisor {
    uint32_t factor = 0;
    int shift = 0;

    static Divisor by(uint32_t number) {  // number * factor exceeds 2^shift by less than number <= 2^(shift - 31)
        int shift = 31;
        while (uint64_t{1} << (shift - 31) < number) ++shift;
        return {static_cast<uint32_t>(((uint64_t{1} << shift) + number - 1) / number), shift};
    }
    SK_ANYWHERE uint32_t divide(uint32_t n) const { return static_cast<uint32_t>(uint64_t{n} * factor >> shift); }
};

template <class To, class From>
SK_DEVICE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    memcpy(&out, &value, sizeof(To));
    return out;
}

// Four bytes of the eight in `low` and `high` (numbered 0..3 and 4..7), one for each nibble of `selector`: numbers up
// to 7 in its low half; its high half does not count.
SK_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if SK_GPU
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
    return out;
#else
    if (selector & 0x8888) emu::fail("permute_bytes: a byte that there is not");
    const uint64_t bytes = low | uint64_t{high} << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
#endif
}

// sum + a . b, of vectors of four unsigned bytes.
SK_DEVICE uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t sum) {
#if SK_GPU
    return __dp4a(a, b, sum);
#else
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
    return sum;
#endif
}

// sum + a . b, of two unsigned 16-bit numbers and two unsigned bytes: the first two of b, or (kHigh) the last two.
template <bool kHigh>
SK_DEVICE uint32_t dot_halves(uint32_t a, uint32_t b, uint32_t sum) {
#if SK_GPU
    return kHigh ? __dp2a_hi(a, b, sum) : __dp2a_lo(a, b, sum);
#else
    const uint32_t bytes = kHigh ? b >> 16 : b;
    return sum + (a & 0xFFFF) * (bytes & 255) + (a >> 16) * (bytes >> 8 & 255);
#endif
}

SK_DEVICE float bf16_to_float(uint16_t bits) { return bits_as<float>(uint32_t{bits} << 16); }

#if !SK_GPU
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_f16(float value) { return bits_as<uint16_t>(static_cast<_Float16>(value)); }
inline float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return __builtin_nanf("");
    const float size =
        exponent ? __builtin_ldexpf(1.0f + mantissa / 8.0f, exponent - 7) : __builtin_ldexpf(mantissa / 8.0f, -6);
    return bits & 0x80 ? -size : size;
}
#endif

SK_DEVICE float f16_to_float(uint16_t bits) {
#if SK_GPU
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
#else
    return static_cast<float>(bits_as<_Float16>(bits));
#endif
}

// Two floats as a pair of 16-bit floats, `low` in the low half.
template <Type T>
SK_DEVICE uint32_t pack_pair(float low, float high) {
    static_assert(T == Type::bf16 || T == Type::f16);
#if SK_GPU
    uint32_t out;
    if constexpr (T == Type::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    }
    return out;
#else
    if constexpr (T == Type::bf16) return float_to_bf16(low) | uint32_t{float_to_bf16(high)} << 16;
    return float_to_f16(low) | uint32_t{float_to_f16(high)} << 16;
#endif
}

// Element i of memory that holds any of the floating types.
SK_DEVICE float load_float(const void* data, Type type, int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return type == Type::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

SK_DEVICE float fast_exp(float x) {
#if SK_GPU
    return __expf(x);
#else
    return __builtin_expf(x);
#endif
}

SK_DEVICE float reciprocal(float x) {
#if SK_GPU
    return __frcp_rn(x);
#else
    return 1.0f / x;
#endif
}

// 1 - erf(x) for x >= 0, within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
SK_DEVICE float error_complement(float x) {
    const float t = reciprocal(1.0f + 0.3275911f * x);
    const float p =
        ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return p * fast_exp(-x * x);
}

// The activations as three functions with parameters: fewer copies of the code around them.
struct Clamp {  // none (no floor) and relu
    float floor;
    SK_DEVICE float operator()(float x) const { return x < floor ? floor : x; }  // NaN stays
};
struct Gelu {
    SK_DEVICE float operator()(float x) const {
        const float q = 0.5f * error_complement((x < 0.0f ? -x : x) * 0.70710678f);
        return x * (x < 0.0f ? q : 1.0f - q);
    }
};
struct Gate {  // x / (1 + exp(-(a x + b x^3))): silu, and gelu_tanh, whose 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u))
    float a, b;
    SK_DEVICE float operator()(float x) const {
        const float u = x < -1e4f ? -1e4f : x > 1e4f ? 1e4f : x;  // its cube is finite
        return x * reciprocal(1.0f + fast_exp(-u * (a + b * u * u)));
    }
};

// Calls f(function) for the run-time activation: the choice is made once, not for every element.
template <class F>
SK_DEVICE void with_activation(Activation activation, F f) {
    switch (activation) {
        case Activation::gelu: return f(Gelu{});
        case Activation::gelu_tanh:
        case Activation::silu: {
            const bool silu = activation == Activation::silu;
            return f(Gate{silu ? 1.0f : 1.5957691f, silu ? 0.0f : 1.5957691f * 0.044715f});
        }
        default: return f(Clamp{activation == Activation::relu ? 0.0f : -__builtin_huge_valf()});
    }
}

}  // namespace sk::device
