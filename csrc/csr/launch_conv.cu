// The convolution of csr: instances and launches.
#include "conv.cuh"
#include "launch.cuh"
#include "planes.cuh"

namespace sk::csr {
namespace {

#define SK_ENTRY_CONV(ROWS, WARPS, KILOBYTES) , ConvTile<T, ROWS, WARPS, KILOBYTES>
template <Type T>
using ConvKernels = Rest<None SK_CSR_CONV(SK_ENTRY_CONV)>;

}  // namespace

std::vector<ConvTileInfo> conv_tiles(int type) {
    std::vector<ConvTileInfo> all;
    with_type(type, [&]<Type T>() {
        [&]<class... C>(Kernels<C...>*) {
            (all.push_back({C::kRowsPer, C::kWarps, C::kRows, C::kPositions, C::kWords, C::kSliceBytes / 4}), ...);
        }(static_cast<ConvKernels<T>*>(nullptr));
    });
    return all;
}

void planes(const PlanesCall& c) {
    with_type(c.type, [&]<Type T>() {
        using C = PlanesTile<T>;
        const auto& [images, channels, height, width, stride_b, stride_c, stride_h, stride_w] = c.image;
        Planes p{};
        p.x = pointer<const char>(c.x);
        p.planes = pointer<uint32_t>(c.planes);
        p.sheets = pointer<const Sheet>(c.sheets);
        p.sheets_count = c.sheets_count;
        p.images = static_cast<int>(images);
        p.channels = static_cast<int>(channels);
        p.height = static_cast<int>(height);
        p.width = static_cast<int>(width);
        p.stride_b = stride_b;
        p.stride_c = stride_c;
        p.stride_h = stride_h;
        p.stride_w = stride_w;
        p.step_h = c.grid[0];
        p.step_w = c.grid[1];
        p.pad_h = c.grid[2];
        p.pad_w = c.grid[3];
        p.pitch = c.grid[4];
        p.lines = c.grid[5];
        p.plane_words = c.plane_words;
        const int64_t tiles = (c.plane_words + C::kWords - 1) / C::kWords;
        const int64_t blocks = tiles * c.sheets_count * up(p.channels, C::kChannels);
        const device::Shape shape{static_cast<unsigned>(blocks), 1, C::kThreads, C::kSharedBytes};
        device::launch("csr_planes", csr_planes<T>, shape, c.stream, p);
    });
}

void conv(const ConvCall& c) {
    with_type(c.type, [&]<Type T>() {
        ConvKernels<T>::pick(c.kernel, [&]<class C>() {
            Conv p{};
            p.values = pointer<const char>(c.values);
            p.offsets = pointer<const uint16_t>(c.offsets);
            p.starts = pointer<const int32_t>(c.starts);
            p.order = pointer<const int32_t>(c.order);
            p.items = pointer<const Item>(c.items);
            p.planes = pointer<const uint32_t>(c.planes);
            p.pieces = pointer<const ConvPiece>(c.pieces);
            p.maps = pointer<const ConvMap>(c.maps);
            p.y = pointer<char>(c.y);
            p.nnz = c.nnz;
            p.plane_words = c.memory[0];
            p.channel_stride = c.memory[1];
            p.unit_stride = c.memory[2];
            p.words = c.memory[3];
            p.y_image = c.memory[4];
            p.y_channel = c.memory[5];
            p.unit_tiles = c.tiling[0];
            p.unit_images = c.tiling[1];
            p.unit_lines = c.tiling[2];
            p.images = c.tiling[3];
            p.pitch = c.tiling[4];
            p.lines = c.tiling[5];
            p.tiles = c.tiling[6];
            p.slices = c.walk[0];
            p.pieces_count = c.walk[1];
            p.slice_channels = c.walk[2];
            p.channel_words = c.walk[3];
            p.group_channels = c.walk[4];
            p.group_rows = c.walk[5];
            p.row_blocks = c.walk[6];
            p.map_rows = c.walk[7];
            p.partials = pointer<float>(c.partials);
            p.counters = pointer<uint32_t>(c.counters);
            p.epilogue = epilogue(
                {.y = c.y, .bias = c.bias, .type = c.type, .bias_type = c.bias_type, .activation = c.activation});
            const device::Shape shape{static_cast<unsigned>(c.items_count) * static_cast<unsigned>(p.tiles), 1,
                                      C::kThreads, C::kSharedBytes};
            device::launch("csr_conv", csr_conv<C>, shape, c.stream, p);
        });
    });
}

}  // namespace sk::csr
