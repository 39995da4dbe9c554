// What the launch files of bitmap share: a list of kernels, and a call as they want it.
#pragma once
#include "../device/launch.h"
#include "kernels.cuh"
#include "mm.cuh"

namespace sk::bitmap {

template <class F>
void with_type(int type, F f) {
    switch (static_cast<Type>(type)) {
        case Type::bf16: return f.template operator()<Type::bf16>();
        case Type::f16: return f.template operator()<Type::f16>();
        default: throw std::runtime_error("bitmap_mm: no kernel for values of type " + std::to_string(type));
    }
}

template <class First, class... C>
struct List {
    static void describe(std::vector<KernelInfo>& to, const char* order) {
        (to.push_back({order, C::kRows, C::kTokens, C::kBlocks, C::kLeast, C::shared_bytes(0),
                       C::shared_bytes(1) - C::shared_bytes(0)}),
         ...);
    }

    // Calls f.template operator()<C>(parameters) for the index-th kernel; returns whether there is one.
    template <class F>
    static bool call(int index, const MmCall& c, F f) {
        int i = 0;
        return ((i++ == index && (f.template operator()<C>(parameters<C>(c)), true)) || ...);
    }

private:
    template <class K>
    static Mm parameters(const MmCall& c) {
        if (c.m > K::kTokens) throw std::runtime_error("bitmap_mm: more tokens than the kernel has");
        const uint64_t all = c.x | static_cast<uint64_t>(c.x_stride) * 2 | static_cast<uint64_t>(c.k) * 2;
        if (all % 4) throw std::runtime_error("bitmap_mm: every row of x must begin and end at a multiple of 4 bytes");
        using Order = typename K::Order;
        Mm p{};
        p.records = reinterpret_cast<const char*>(c.records);
        p.offsets = reinterpret_cast<const int32_t*>(c.offsets);
        p.x = reinterpret_cast<const char*>(c.x);
        p.y = reinterpret_cast<char*>(c.y);
        p.x_stride = c.x_stride;
        p.y_stride = c.y_stride;
        p.m = c.m;
        p.n = c.n;
        p.k = c.k;
        p.row_blocks = (c.n + Order::kRows - 1) / Order::kRows;
        p.k_blocks = (c.k + Order::kColumns - 1) / Order::kColumns;
        p.streamed = (c.n + K::kRows - 1) / K::kRows;
        if (!device::fits(p.row_blocks, p.k_blocks, c.workers)) {
            throw std::runtime_error("bitmap_mm: too much work for one launch");
        }
        p.x_align = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : 4;
        p.record_bytes = c.longest;
        p.partials = reinterpret_cast<float*>(c.partials);
        p.counters = reinterpret_cast<uint32_t*>(c.counters);
        p.epilogue = {nullptr,
                      reinterpret_cast<const float*>(c.x_scale),
                      reinterpret_cast<const void*>(c.bias),
                      reinterpret_cast<const void*>(c.residual),
                      c.residual_stride,
                      1.0f,
                      c.beta,
                      static_cast<Type>(c.bias_type),
                      static_cast<Type>(c.out_type),
                      static_cast<device::Activation>(c.activation)};
        return p;
    }
};

template <class C>
device::Shape shape_of(const MmCall& c) {
    return {static_cast<unsigned>(c.workers), 1, C::kThreads, static_cast<size_t>(C::shared_bytes(c.longest))};
}

// The kernels of sm_90a (launch_sm90.cu).
void list_mm_sm90(int type, std::vector<KernelInfo>& to);
bool run_mm_sm90(const MmCall& call);

}  // namespace sk::bitmap
