// Planes of images: X [B, C, H, W] as csr_conv reads it. The images of a channel one below the other, each with zeros
// around it, as one long run of elements, so that a tap of a filter is a distance in it: r lines and s elements on.
//
// Between two lines there are only as many zeros as padding needs, for they end one line and begin the next; the same
// holds for the lines between two images. A step (stride) of the convolution makes several planes, one for each phase
// of the step that some tap meets. 16-bit elements lie in pairs, in 32-bit words, and a plane comes as up to two
// sheets: from its first element on, and from its second one on, for taps an odd distance away.
//
// Bytes: X is read once, and 4 bytes an element are written for each phase (two sheets of 16-bit ones): 13 and 28 MB
// for bf16 images of [32, 256, 28, 28] and a 3x3 filter, 12 us of an H100's memory. Operations: none but the addresses,
// found once for 32 channels. Images with channels innermost are transposed on the way, in shared memory; both orders
// are read in whole sectors where there are 8 (fp32) or 16 channels, or lines as long.
#pragma once
#include <type_traits>

#include "../device/copy.h"

namespace sk::csr {

using device::Type;

// Which elements a sheet holds: those of phase (row, column) of the step, from element `odd` (0 or 1) on.
struct alignas(16) Sheet {
    int row, column, odd, unused;
};

struct Planes {
    const char* x;
    uint32_t* planes;  // [channels][sheets][plane_words]
    const Sheet* sheets;
    int sheets_count, images, channels, height, width;
    int64_t stride_b, stride_c, stride_h, stride_w;  // in elements, of X
    int step_h, step_w, pad_h, pad_w;                // element (u, v) of phase (a, b) is X[u step_h + a - pad_h, ...]
    int pitch, lines;                                // elements of a line, lines of an image
    int64_t plane_words;
};

template <Type T>
struct PlanesTile {
    static constexpr int kThreads = 256, kWords = 64, kChannels = 32;
    static constexpr int kElements = kWords * 4 / device::bytes_of(T);
    static constexpr int kPitch = (kWords + 1) * 4;  // no bank conflicts either way
    static constexpr int kSharedBytes = kElements * 4 + kChannels * kPitch;
};

// One block for every 64 words of a sheet of 32 channels.
template <Type T>
SK_KERNEL(PlanesTile<T>::kThreads, 4)
csr_planes(SK_PARAM Planes p) {
    using namespace device;
    using C = PlanesTile<T>;
    using Element = std::conditional_t<bytes_of(T) == 4, uint32_t, uint16_t>;
    auto* sources = reinterpret_cast<int*>(shared_memory());
    char* elements = shared_memory() + C::kElements * 4;
    const int tiles = static_cast<int>((p.plane_words + C::kWords - 1) / C::kWords);
    const int word0 = block_x() % tiles * C::kWords, rest = block_x() / tiles;
    const int sheet = rest % p.sheets_count, channel0 = rest / p.sheets_count * C::kChannels;
    const Sheet which = p.sheets[sheet];
    for (int i = thread_index(); i < C::kElements; i += C::kThreads) {
        const int at = word0 * (C::kElements / C::kWords) + i + which.odd, line = at / p.pitch, image = line / p.lines;
        const int h = line % p.lines * p.step_h + which.row - p.pad_h;
        const int w = at % p.pitch * p.step_w + which.column - p.pad_w;
        const bool inside = image < p.images && h >= 0 && h < p.height && w >= 0 && w < p.width;
        sources[i] =
            inside ? static_cast<int>(image * p.stride_b + h * p.stride_h + w * p.stride_w) : -1;  // X has 2^31 at most
    }
    sync_block();
    const bool last = p.stride_c == 1;  // neighbouring threads read neighbouring channels, or pixels
    SK_UNROLL_2
    for (int i = thread_index(); i < C::kElements * C::kChannels; i += C::kThreads) {
        const int inside = last ? i / C::kChannels : i % C::kElements;
        const int channel = last ? i % C::kChannels : i / C::kElements, source = sources[inside];
        Element value = 0;
        if (source >= 0 && channel0 + channel < p.channels) {
            value = reinterpret_cast<const Element*>(p.x)[source + (channel0 + channel) * p.stride_c];
        }
        *reinterpret_cast<Element*>(elements + channel * C::kPitch + inside * sizeof(Element)) = value;
    }
    sync_block();
    SK_UNROLL_2
    for (int i = thread_index(); i < C::kWords * C::kChannels; i += C::kThreads) {
        const int word = i % C::kWords, channel = i / C::kWords;
        if (word0 + word < p.plane_words && channel0 + channel < p.channels) {
            p.planes[(int64_t{channel0 + channel} * p.sheets_count + sheet) * p.plane_words + word0 + word] =
                *reinterpret_cast<const uint32_t*>(elements + channel * C::kPitch + word * 4);
        }
    }
}

}  // namespace sk::csr
