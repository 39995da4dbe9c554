// sp24_repack's launches: 16-bit elements (type 1 stands for them) and 8-bit ones (type 3).
// SK_TYPE: 1 3
#include <stdexcept>

#include "../device/launch.h"
#include "kernels.cuh"
#include "pack.cuh"

namespace sk::sp24 {
namespace {

template <class T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

bool divides(uint64_t bytes, uint64_t address, int64_t stride) {
    return (address | static_cast<uint64_t>(stride)) % bytes == 0;
}

Repack parameters(const RepackCall& c) {
    const Type type = static_cast<Type>(c.type);
    const int size = device::bytes_of(type);
    Repack p{};
    p.dense = at<const char>(c.dense);
    p.mask = at<const uint8_t>(c.mask);
    p.values = at<const char>(c.values);
    p.metadata = at<const uint8_t>(c.metadata);
    p.fragments = at<const char>(c.fragments);
    p.to_fragments = at<char>(c.to_fragments);
    p.to_transposed = at<char>(c.to_transposed);
    p.to_values = at<char>(c.to_values);
    p.to_metadata = at<uint8_t>(c.to_metadata);
    p.to_dense = at<char>(c.to_dense);
    p.first = at<uint64_t>(c.first);
    p.dense_stride = c.dense_stride * size;
    p.mask_stride = c.mask_stride;
    p.to_dense_stride = c.to_dense_stride * size;
    p.n = c.n;
    p.k = c.k;
    p.row_blocks = (c.n + kBlockRows - 1) / kBlockRows;
    p.k_blocks = (c.k + block_k(type) - 1) / block_k(type);
    p.row_bytes = c.k * size;
    p.values_bytes = (c.k + 7) / 8 * 4 * size;
    p.metadata_bytes = (c.k + 7) / 8;
    p.sign_free = type == Type::i8 ? 0xFFFFFFFFu : type == Type::e4m3 ? 0x7F7F7F7Fu : 0x7FFF7FFFu;
    p.top = type == Type::bf16 ? 0x7F81 : type == Type::f16 ? 0x7C01 : 0xFF;
    p.type = type;
    p.vector_dense = divides(16, c.dense, p.dense_stride);
    p.vector_values = divides(16, c.values, p.values_bytes);
    p.vector_mask = divides(8, c.mask, p.mask_stride);
    p.vector_to_dense = divides(16, c.to_dense, p.to_dense_stride);
    p.vector_to_values = divides(16, c.to_values, p.values_bytes);
    if ((c.fragments | c.to_fragments | c.to_transposed) % 16) {
        throw std::runtime_error("sp24_repack: fragments must begin at a multiple of 16 bytes");
    }
    return p;
}

template <bool kWide, From kFrom>
void launch(const RepackCall& call) {
    const Repack p = parameters(call);
    if (p.row_blocks == 0 || p.k_blocks == 0) return;
    if (p.to_transposed && !has_tile(kWide, kFrom)) {
        throw std::runtime_error("sp24_repack: this source has no transposed destination");
    }
    const device::Shape shape{static_cast<unsigned>(p.row_blocks) * static_cast<unsigned>(p.k_blocks), 1, 128,
                              has_tile(kWide, kFrom) ? forms::kSharedBytes : 0};
    device::launch("sp24_repack", sp24_repack<kWide, kFrom>, shape, call.stream, p);
}

}  // namespace

template <int kType>
void run_repack(const RepackCall& call) {
    constexpr bool kWide = device::is_wide(static_cast<Type>(kType));
    switch (static_cast<From>(call.from)) {
        case From::top2: return launch<kWide, From::top2>(call);
        case From::strict: return launch<kWide, From::strict>(call);
        case From::mask: return launch<kWide, From::mask>(call);
        case From::transposable:
            if constexpr (kWide) return launch<kWide, From::transposable>(call);
            break;
        case From::sample: return launch<kWide, From::sample>(call);
        case From::canonical: return launch<kWide, From::canonical>(call);
        case From::fragments: return launch<kWide, From::fragments>(call);
    }
    throw std::runtime_error("sp24_repack: there is no such source for this type");
}

template void run_repack<SK_TYPE>(const RepackCall& call);

}  // namespace sk::sp24
