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

// Accumulators stay in their registers while they become outputs; an integer's register then holds a float.
template <class Acc>
SK_DEVICE float as_float(Acc acc) {
    return bits_as<float>(acc);
}

template <class F, class Acc>
SK_DEVICE Acc finish(F activate, const RowEpilogue& r, float x_scale, Acc acc) {
    return bits_as<Acc>(activate(static_cast<float>(acc) * (r.scale * x_scale) + r.bias));
}

// A finished 32-bit output (float or int32) is the accumulator's register; the residual is added on its way.
template <class Acc>
SK_DEVICE void store_wide(const Epilogue& e, void* y, int64_t stride, int token, int row, Acc acc) {
    const float* residual = static_cast<const float*>(e.residual);
    const float more = residual ? e.beta * residual[token * e.residual_stride + row] : 0.0f;
    auto* to = static_cast<uint32_t*>(y) + token * stride + row;
    *to = residual ? bits_as<uint32_t>(as_float(acc) + more) : bits_as<uint32_t>(acc);
}

SK_DEVICE uint32_t pack_output(Type out, float low, float high) {
    return out == Type::bf16 ? pack_pair<Type::bf16>(low, high) : pack_pair<Type::f16>(low, high);
}

// One finished output of any type.
template <class Acc>
SK_DEVICE void store_one(const Epilogue& e, void* y, int64_t stride, int token, int row, Acc acc) {
    if (bytes_of(e.out_type) != 2) return store_wide(e, y, stride, token, row, acc);
    float value = as_float(acc);
    if (e.residual) value += e.beta * load_float(e.residual, e.out_type, token * e.residual_stride + row);
    static_cast<uint16_t*>(y)[token * stride + row] = static_cast<uint16_t>(pack_output(e.out_type, value, 0));
}

// Eight neighbouring 16-bit outputs of a token, `count` of them inside of Y. The residual is added to the rounded
// values: one rounding more than a single store has.
SK_DEVICE void store_row(const Epilogue& e, void* y, int64_t stride, int token, int row, int count, Vec4 eight) {
    uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    if (e.residual) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            float sum[2];
            SK_UNROLL
            for (int c = 0; c < 2; ++c) {
                const auto bits = static_cast<uint16_t>(words[i] >> (16 * c));
                const float value = e.out_type == Type::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
                const bool valid = 2 * i + c < count;
                const int64_t at = token * e.residual_stride + row + 2 * i + c;
                sum[c] = value + (valid ? e.beta * load_float(e.residual, e.out_type, at) : 0.0f);
            }
            words[i] = pack_output(e.out_type, sum[0], sum[1]);
        }
    }
    auto* to = static_cast<uint16_t*>(y) + token * stride + row;
    if (count == 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        *reinterpret_cast<Vec4*>(to) = {words[0], words[1], words[2], words[3]};
        return;
    }
    SK_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i < count) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
}

}  // namespace sk::device
