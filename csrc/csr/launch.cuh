// What the launch files of csr share: the choice among the kernels of a list, and a call's numbers as kernels want
// them.
#pragma once
#include "../device/epilogue.h"
#include "../device/launch.h"
#include "kernels.cuh"

namespace sk::csr {

using device::Type;

template <class F>
auto with_type(int type, F f) {
    switch (static_cast<Type>(type)) {
        case Type::f32: return f.template operator()<Type::f32>();
        case Type::bf16: return f.template operator()<Type::bf16>();
        case Type::f16: return f.template operator()<Type::f16>();
        default: throw std::runtime_error("csr: no kernel for values of type " + std::to_string(type));
    }
}

template <class... C>
struct Kernels {
    template <class F>
    static void pick(int index, F f) {
        int i = 0;
        const bool found = ((i++ == index && (f.template operator()<C>(), true)) || ...);
        if (!found) throw std::runtime_error("csr: there is no kernel " + std::to_string(index));
    }
};
struct None {};
template <class, class... C>
using Rest = Kernels<C...>;

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

inline int up(int a, int b) { return (a + b - 1) / b; }

inline device::Epilogue epilogue(const Out& out) {
    device::Epilogue e{};
    e.x_scale = pointer<const float>(out.x_scale);
    e.bias = pointer<const void>(out.bias);
    e.residual = pointer<const void>(out.residual);
    e.residual_stride = out.residual_stride;
    e.alpha = 1.0f;
    e.beta = out.beta;
    e.bias_type = static_cast<Type>(out.bias_type);
    e.out_type = static_cast<Type>(out.type);
    e.activation = static_cast<device::Activation>(out.activation);
    return e;
}

}  // namespace sk::csr
