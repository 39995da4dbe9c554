// Panels of activations: X[M, K] cut into strips of as many tokens as 128 bytes hold, each strip stored as K such rows.
//
// A stored weight (n, k) meets X[., k]: a column of a row-major X. Two numbers decide for a copy of X in panels, at
// M = 512, K = N = 4096, fp32 and density 0.1:
//   bytes       the copy reads and writes X once: 16 MB, 5 us. Without it every block that holds a slice of X in shared
//               memory has to transpose it on its way: with 512 rows a block that is 8 times 2 M elements.
//   operations  a block meets a slice's element R * density times (R rows a block: 51 at R = 512), and each time takes
//               a 128-byte row of it at the full rate of shared memory, 1 row a cycle: 32 of 128 possible fp32
//               multiply- adds a cycle, 64 with 16-bit types. From the second-level cache (24 bytes a cycle and SM) it
//               would be 6.
// A slice of a panel is contiguous, so it travels by 16-byte cp.async, and neither its store nor its loads meet a bank
// conflict. The tokens that fill up the last strip are zeros.
#pragma once
#include <type_traits>

#include "../device/copy.h"

namespace sk::csr {

using device::Type;

constexpr int kPanelBytes = 128;  // of a row of a panel
constexpr int kTileK = 512;       // rows of a slice: the byte offset of a row inside of it fits 16 bits
constexpr int kSubwarp = 8;       // lanes that share a row of W: 16 bytes of a panel's row each

SK_ANYWHERE constexpr int panel_tokens(Type t) { return kPanelBytes / device::bytes_of(t); }

struct Panels {
    const char* x;
    char* panels;
    int64_t stride;  // elements from token to token
    int m, columns;
};

template <Type T>
struct PanelTile {
    static constexpr int kThreads = 256, kColumns = 64, kTokens = panel_tokens(T);
    static constexpr int kPitch = kPanelBytes + 4;  // no bank conflicts either way
    static constexpr int kSharedBytes = kColumns * kPitch;
};

// One block for every strip of tokens and 64 columns.
template <Type T>
SK_KERNEL(PanelTile<T>::kThreads, 4)
csr_panels(SK_PARAM Panels p) {
    using namespace device;
    using C = PanelTile<T>;
    using Element = std::conditional_t<bytes_of(T) == 4, uint32_t, uint16_t>;
    char* memory = shared_memory();
    const int strips = (p.columns + C::kColumns - 1) / C::kColumns;
    const int column0 = block_x() % strips * C::kColumns, tile = block_x() / strips;
    SK_UNROLL
    for (int i = thread_index(); i < C::kTokens * C::kColumns; i += C::kThreads) {
        const int column = i % C::kColumns, inside = i / C::kColumns, token = tile * C::kTokens + inside;
        Element value = 0;
        if (token < p.m && column0 + column < p.columns) {
            value = reinterpret_cast<const Element*>(p.x)[token * p.stride + column0 + column];
        }
        *reinterpret_cast<Element*>(memory + column * C::kPitch + inside * sizeof(Element)) = value;
    }
    sync_block();
    auto* to = reinterpret_cast<uint32_t*>(p.panels + (int64_t{tile} * p.columns + column0) * kPanelBytes);
    SK_UNROLL
    for (int i = thread_index(); i < C::kColumns * kPanelBytes / 4; i += C::kThreads) {
        const int column = i / (kPanelBytes / 4), word = i % (kPanelBytes / 4);
        if (column0 + column < p.columns) {
            to[i] = *reinterpret_cast<const uint32_t*>(memory + column * C::kPitch + word * 4);
        }
    }
}

// Begins to bring rows [row0, row0 + rows) of a panel to shared memory.
template <int kThreads>
SK_DEVICE void copy_slice(char* to, const char* panel, int row0, int rows, uint32_t thread) {
    const uint32_t shared = device::shared_address(to);
    const char* from = panel + int64_t{row0} * kPanelBytes;
    SK_NO_UNROLL
    for (int i = thread * 16; i < rows * kPanelBytes; i += kThreads * 16) {
        device::copy_async<16>(shared + i, from + i, true);
    }
}

// A lane's 16 bytes of a panel's row as floats.
template <Type T>
SK_DEVICE void load_tokens(float (&out)[16 / device::bytes_of(T)], const char* at) {
    using namespace device;
    const Vec4 v = *reinterpret_cast<const Vec4*>(at);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (T == Type::f32) out[i] = bits_as<float>(words[i]);
        if constexpr (T == Type::bf16) {
            out[2 * i] = bits_as<float>(words[i] << 16);
            out[2 * i + 1] = bits_as<float>(words[i] & 0xFFFF0000u);
        }
        if constexpr (T == Type::f16) {
            out[2 * i] = f16_to_float(static_cast<uint16_t>(words[i]));
            out[2 * i + 1] = f16_to_float(static_cast<uint16_t>(words[i] >> 16));
        }
    }
}

}  // namespace sk::csr
