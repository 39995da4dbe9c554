// What happens to an accumulator before it becomes an output.
#pragma once
#include "numeric.h"

namespace sk::device {

// y = act(alpha * w_scale[row] * x_scale[token] * acc + bias[row]) + beta * residual[token, row]; every pointer may be
// null. Rows are out-features (N), tokens are rows of X and of Y [M, N]. int32 outputs are the sums as they are.
struct Epilogue {
    const float* w_scale;
    const float* x_scale;
    const void* bias;
    const void* residual;  // of the output's type
    int64_t residual_stride;
    float alpha, beta;
    Type bias_type, out_type;
    Activation activation;
};

// The part that one row needs once.
struct RowEpilogue {
    float scale, bias;
};

SK_DEVICE RowEpilogue row_epilogue(const Epilogue& e, int row, bool valid) {
    RowEpilogue out{e.alpha, 0.0f};
    if (valid) {
        if (e.w_scale) out.scale *= e.w_scale[row];
        if (e.bias) out.bias = load_float(e.bias, e.bias_type, row);
    }
    return out;
}

SK_DEVICE float token_scale(const Epilogue& e, int token, bool valid) {
    return e.x_scale && valid ? e.x_scale[token] : 1.0f;
}

// The linear part, in the accumulator's register: an integer's then holds a float.
template <class Acc>
SK_DEVICE Acc scale_and_shift(const RowEpilogue& r, float x_scale, Acc acc) {
    return bits_as<Acc>(static_cast<float>(acc) * (r.scale * x_scale) + r.bias);
}

SK_DEVICE uint32_t pack_output(Type out, float low, float high) {
    return out == Type::bf16 ? pack_pair<Type::bf16>(low, high) : pack_pair<Type::f16>(low, high);
}

// The rest, for neighbouring outputs of a token whose linear part is done: activation, residual, and the store. `words`
// holds kValues of them as 32-bit floats (or int32 sums), or as pairs of 16-bit floats: what an activation does to
// 16-bit outputs it does to rounded values, as torch's two operations do. `count` of them are inside of Y.
template <int kValues, int kWords>
SK_DEVICE void store_values(const Epilogue& e, void* y, int64_t stride, int token, int row, int count,
                            uint32_t (&words)[kWords]) {
    constexpr bool kWide = kValues == kWords;
    const Type out = e.out_type;
    if (out != Type::i32 && (e.activation != Activation::none || e.residual)) {
        float values[kValues];
        SK_UNROLL
        for (int i = 0; i < kValues; ++i) {
            const auto half = static_cast<uint16_t>(words[kWide ? i : i / 2] >> (16 * (i % 2)));
            values[i] = kWide               ? bits_as<float>(words[kWide ? i : 0])
                        : out == Type::bf16 ? bf16_to_float(half)
                                            : f16_to_float(half);
        }
        with_activation(e.activation, [&](auto activate) {
            SK_UNROLL
            for (int i = 0; i < kValues; ++i) values[i] = activate(values[i]);
        });
        if (e.residual) {
            SK_UNROLL
            for (int i = 0; i < kValues; ++i) {
                const int64_t at = token * e.residual_stride + row + i;
                values[i] += i < count ? e.beta * load_float(e.residual, out, at) : 0.0f;
            }
        }
        SK_UNROLL
        for (int i = 0; i < kWords; ++i) {
            words[i] = kWide ? bits_as<uint32_t>(values[i])
                             : pack_output(out, values[kWide ? i : 2 * i], values[kWide ? i : 2 * i + 1]);
        }
    }
    char* to = static_cast<char*>(y) + (token * stride + row) * (kWide ? 4 : 2);
    if constexpr (kWords == 4) {
        if (count == kValues && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
            *reinterpret_cast<Vec4*>(to) = {words[0], words[1], words[2], words[3]};
            return;
        }
    }
    SK_UNROLL
    for (int i = 0; i < kValues; ++i) {
        if (i < count && kWide) reinterpret_cast<uint32_t*>(to)[i] = words[kWide ? i : 0];
        if (i < count && !kWide) {
            reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[kWide ? 0 : i / 2] >> (16 * (i % 2)));
        }
    }
}

// One output alone, of a sum whose linear part is done.
template <class Acc>
SK_DEVICE void store_one(const Epilogue& e, void* y, int64_t stride, int token, int row, Acc acc) {
    if (bytes_of(e.out_type) == 4) {
        uint32_t words[1] = {bits_as<uint32_t>(acc)};
        return store_values<1>(e, y, stride, token, row, 1, words);
    }
    float value = bits_as<float>(acc);
    with_activation(e.activation, [&](auto activate) { value = activate(value); });
    if (e.residual) value += e.beta * load_float(e.residual, e.out_type, token * e.residual_stride + row);
    static_cast<uint16_t*>(y)[token * stride + row] = static_cast<uint16_t>(pack_output(e.out_type, value, 0));
}

}  // namespace sk::device
