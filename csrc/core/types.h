// The words every host kernel speaks: element types, activations, a dense operand, the epilogue.
// Plain data only, no code that an instruction set could change, so that every TU may share it.
#pragma once
#include <cstdint>

namespace sk {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };
enum class Act : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

inline constexpr int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : t == Dtype::i8 ? 1 : 2; }

// A row-major matrix: element (i, j) lies at data + (i * ld + j) * size_of(dtype).
struct Dense {
    void* data;
    Dtype dtype;
    int64_t rows, cols, ld;
};

// y = act(scale[n] * acc + bias[n]); scale and bias may be null. scale is float, bias has its own type.
struct Epilogue {
    const float* scale;
    const void* bias;
    Dtype bias_dtype;
    Act act;
};

}  // namespace sk
