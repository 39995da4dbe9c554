// What the launch files of sp24 share: a call as the kernels want it, and the choice among a list of kernels.
#pragma once
#include <tuple>
#include <utility>

#include "../device/launch.h"
#include "kernels.cuh"
#include "mm.cuh"

namespace sk::sp24 {

template <Type T>
Mm mm_parameters(const MmCall& c) {
    const int bytes = device::bytes_of(T);
    const bool images = c.images.kernel_w != 0;
    const uint64_t row = images ? c.images.channels : c.k;
    const uint64_t all = c.x | static_cast<uint64_t>(c.x_stride) * bytes | row * bytes;
    Mm p{};
    p.fragments = reinterpret_cast<const char*>(c.fragments);
    p.x = reinterpret_cast<const char*>(c.x);
    p.y = reinterpret_cast<char*>(c.y);
    p.x_stride = c.x_stride;
    p.y_stride = c.y_stride;
    p.m = c.m;
    p.n = c.n;
    p.k = c.k;
    p.row_blocks = (c.n + kBlockRows - 1) / kBlockRows;
    p.k_blocks = (c.k + block_k(T) - 1) / block_k(T);
    p.x_align = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : 4;
    if (all % 4) throw std::runtime_error("sp24_mm: every row of x must begin and end at a multiple of 4 bytes");
    if (images) {
        if (!device::is_wide(T)) throw std::runtime_error("sp24_mm: images need 16-bit values");
        p.images = c.images;
        p.channels = device::Divisor::by(c.images.channels);
        p.kernel_w = device::Divisor::by(c.images.kernel_w);
    }
    p.streamed = c.streamed;
    if (!device::fits(c.streamed ? c.streamed : p.row_blocks, p.k_blocks, c.workers)) {
        throw std::runtime_error("sp24_mm: too much work for one launch");
    }
    p.partials = reinterpret_cast<void*>(c.partials);
    p.counters = reinterpret_cast<uint32_t*>(c.counters);
    p.epilogue = {reinterpret_cast<const float*>(c.w_scale),
                  reinterpret_cast<const float*>(c.x_scale),
                  reinterpret_cast<const void*>(c.bias),
                  reinterpret_cast<const void*>(c.residual),
                  c.residual_stride,
                  c.alpha,
                  c.beta,
                  static_cast<Type>(c.bias_type),
                  static_cast<Type>(c.out_type),
                  static_cast<device::Activation>(c.activation)};
    return p;
}

// Calls f.template operator()<C>() for the index-th type of the tuple.
template <class Tuple, class F>
void with_config(int index, F f) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        const bool found =
            ((static_cast<int>(I) == index && (f.template operator()<std::tuple_element_t<I, Tuple>>(), true)) || ...);
        if (!found) throw std::runtime_error("sp24: there is no kernel " + std::to_string(index));
    }(std::make_index_sequence<std::tuple_size_v<Tuple>>());
}

// A tuple of the list's types without its first, empty element.
template <class First, class... Rest>
std::tuple<Rest...> rest_of(std::tuple<First, Rest...>);

}  // namespace sk::sp24
