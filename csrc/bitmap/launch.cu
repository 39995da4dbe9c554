// The kernels of bitmap: instances and launches.
#include <tuple>

#include "../device/launch.h"
#include "expand.cuh"
#include "kernels.cuh"
#include "mm.cuh"

namespace sk::bitmap {
namespace {

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
    template <class F>
    static void each(F f) {
        int i = 0;
        (f.template operator()<C>(i++), ...);
    }
};
#define SK_ENTRY(TOKENS, WARPS, STAGES) , MmTile<T, TOKENS, WARPS, STAGES>
template <Type T>
using Kernels = List<void SK_BITMAP_MM(SK_ENTRY)>;

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

template <bool kToDense>
void expand(const ExpandCall& c) {
    const Expand p{pointer<char>(c.values),
                   pointer<const uint8_t>(c.bits),
                   pointer<const int64_t>(c.offsets),
                   pointer<char>(c.dense),
                   c.n,
                   c.k,
                   (c.k + 7) / 8};
    constexpr int kRows = kExpandThreads / 32;
    const device::Shape shape{static_cast<unsigned>((c.n + kRows - 1) / kRows), 1, kExpandThreads, 0};
    if (device::bytes_of(static_cast<Type>(c.type)) == 4) {
        device::launch("bitmap_expand", bitmap_expand<uint32_t, kToDense>, shape, c.stream, p);
    } else {
        device::launch("bitmap_expand", bitmap_expand<uint16_t, kToDense>, shape, c.stream, p);
    }
}

}  // namespace

std::vector<KernelInfo> kernels(int type) {
    std::vector<KernelInfo> all;
    with_type(type, [&]<Type T>() {
        Kernels<T>::each([&]<class C>(int) {
            all.push_back(
                {C::kTokens, C::kWarps, C::kBlocks, C::shared_bytes(0), C::shared_bytes(1) - C::shared_bytes(0)});
        });
    });
    return all;
}

void mm(const MmCall& c) {
    const uint64_t all = c.x | static_cast<uint64_t>(c.x_stride) * 2 | static_cast<uint64_t>(c.k) * 2;
    if (all % 4) throw std::runtime_error("bitmap_mm: every row of x must begin and end at a multiple of 4 bytes");
    Mm p{};
    p.records = pointer<const char>(c.records);
    p.offsets = pointer<const int32_t>(c.offsets);
    p.x = pointer<const char>(c.x);
    p.y = pointer<char>(c.y);
    p.x_stride = c.x_stride;
    p.y_stride = c.y_stride;
    p.m = c.m;
    p.n = c.n;
    p.k = c.k;
    p.row_blocks = p.streamed = (c.n + kTileRows - 1) / kTileRows;
    p.k_blocks = (c.k + kTileColumns - 1) / kTileColumns;
    if (!device::fits(p.streamed, p.k_blocks, c.workers)) {
        throw std::runtime_error("bitmap_mm: too much work for one launch");
    }
    p.x_align = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : 4;
    p.partials = pointer<float>(c.partials);
    p.counters = pointer<uint32_t>(c.counters);
    p.epilogue.bias = pointer<const void>(c.bias);
    p.epilogue.alpha = 1.0f;
    p.epilogue.bias_type = static_cast<Type>(c.bias_type);
    p.epilogue.out_type = static_cast<Type>(c.type);
    p.epilogue.activation = static_cast<device::Activation>(c.activation);
    bool found = false;
    with_type(c.type, [&]<Type T>() {
        Kernels<T>::each([&]<class C>(int i) {
            if (i != c.kernel) return;
            found = true;
            if (c.m > C::kTokens) throw std::runtime_error("bitmap_mm: more tokens than the kernel has");
            p.stage_bytes = C::kTokenBytes + c.longest;
            const device::Shape shape{static_cast<unsigned>(c.workers), 1, C::kThreads,
                                      static_cast<size_t>(C::shared_bytes(c.longest))};
            device::launch("bitmap_mm", bitmap_mm<C>, shape, c.stream, p);
        });
    });
    if (!found) throw std::runtime_error("bitmap_mm: there is no kernel " + std::to_string(c.kernel));
}

void to_dense(const ExpandCall& call) { expand<true>(call); }
void from_dense(const ExpandCall& call) { expand<false>(call); }

}  // namespace sk::bitmap
