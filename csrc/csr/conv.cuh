// csr_conv: a convolution with a sparse weight, Y = epilogue(conv(X, W)), or its gradient by X, over planes of X
// (planes.cuh): no image is ever unfolded.
//
// A position is an element of a plane. A block takes 256 neighbouring positions and a group of rows of W; a warp owns
// kRowsPer of the rows, one after the other, each lane 8 positions of them with their sums in registers. The planes of
// some channels (a slice) lie in shared memory, as far as the positions' taps reach, and are shared by all rows and
// taps. A stored weight (n, (c, r, s)) is then one distance in the slice, 16 bits a nonzero from a plan
// (sparsekern/conv/rows_cuda.py), and lanes read neighbouring words from there: no bank conflict, no predicate, no
// matter which step, dilation or padding there is. Positions between lines and images are computed and dropped:
// 1 of 29 in each direction for images of 28 x 28 and a padding of 1.
//
// Two numbers decide how this is done, per SM and cycle of an H100:
//   operations  every multiply-add takes a word from shared memory, 32 lanes a cycle: 30 multiply-adds with fp32 (the
//               weight's 6 bytes for 8 words make it less than 32), about 40 with pairs of 16-bit elements, where the
//               conversions limit it. At density d that is worth 30 / d (40 / d) dense ones; the tensor cores have
//               1024 with TF32 and 2048 with 16 bits, of which a dense convolution gets about half, and without TF32
//               there are 128. So at 90 % sparsity this is 2.3 times as fast as dense fp32, and 0.6 (0.4) times as fast
//               as the tensor cores: rows_cuda.py knows, and writes the weight out densely there.
//   bytes       a slice's word is brought once for all rows of a block (128) and used rows * taps * d times: 115 at
//               d = 0.1 and 3x3. From the first-level cache, without a slice, each use would take two lines instead of
//               one. Unfolding would write and read 9 times X.
//
// Values and offsets are read in vectors of 4, the same for all lanes, as in mm.cuh, which also says what `starts`,
// `order` and `items` are.
#pragma once
#include "mm.cuh"

namespace sk::csr {

// Words [first, first + words) of a sheet, counted from the block's first position on, lie at `base` of a channel's
// words in the slice. Multiples of 4.
struct alignas(16) ConvPiece {
    int sheet, first, words, base;
};

// Position (i, j) of an image with i in [i0, i1) and j in [j0, j1) is an output: element
// offset + i * stride_i + j * stride_j of its channel's plane in Y.
struct alignas(16) ConvMap {
    int i0, i1, j0, j1, offset, stride_i, stride_j, unused;
};

struct Conv {
    const char* values;
    const uint16_t* offsets;  // in words
    const int32_t *starts, *order;
    const Item* items;
    const uint32_t* planes;
    const ConvPiece* pieces;
    const ConvMap* maps;  // one for every map_rows rows of a group of the convolution
    char* y;
    int64_t nnz;
    int64_t plane_words, channel_stride, unit_stride, words;  // words: of all planes
    int unit_tiles, unit_images, unit_lines;                  // tiles never reach across units: all images, or each
    int images, pitch, lines, tiles, slices, pieces_count;
    int slice_channels, channel_words;  // of a slice
    int group_channels, group_rows, row_blocks, map_rows;
    int64_t y_image, y_channel;
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

template <Type T_, int kRowsPer_, int kWarps_, int kSliceKilobytes_>
struct ConvTile {
    static constexpr Type T = T_;
    static constexpr int kRowsPer = kRowsPer_, kWarps = kWarps_, kThreads = kWarps * 32, kRows = kRowsPer * kWarps;
    static constexpr int kPer = 4 / device::bytes_of(T), kPositions = 256, kWords = kPositions / kPer;
    static constexpr int kLoads = kWords / 32, kCount = kRowsPer * kLoads * kPer;
    static constexpr int kSliceBytes = kSliceKilobytes_ * 1024;
    static constexpr int kPitch = kRows + 1;  // floats from position to position while Y is put together
    static constexpr int kStrip = 32 * kPer;  // positions at a time
    static constexpr int kPlaceBytes = kPositions * 16, kStagingBytes = kPlaceBytes + kStrip * kPitch * 4;
    static constexpr int kSharedBytes = 2 * kSliceBytes + 16;
    static constexpr int kBlocks = kWarps == 16 ? 1 : 3;
    static_assert(kStagingBytes <= 2 * kSliceBytes && kRowsPer <= 32);
};

template <class C>
SK_DEVICE void copy_planes(const Conv& p, char* to, int64_t source, int channels) {
    using namespace device;
    const uint32_t shared = shared_address(to), warp = warp_index(), my_lane = lane();
    SK_NO_UNROLL
    for (int c = warp; c < channels; c += C::kWarps) {
        SK_NO_UNROLL
        for (int i = 0; i < p.pieces_count; ++i) {
            const ConvPiece piece = p.pieces[i];
            const int64_t from = source + c * p.channel_stride + piece.sheet * p.plane_words + piece.first;
            SK_NO_UNROLL
            for (int w = my_lane * 4; w < piece.words; w += 128) {
                const bool valid = from + w + 4 <= p.words;
                copy_async<16>(shared + (c * p.channel_words + piece.base + w) * 4, p.planes + (valid ? from + w : 0),
                               valid);
            }
        }
    }
}

// Writes the sums of all positions, a strip of them at a time through shared memory: neighbouring threads then write
// neighbouring outputs, pixels or channels.
template <class C>
SK_DEVICE void store_positions(const Conv& p, char* memory, const float (&acc)[C::kRowsPer][C::kLoads * C::kPer],
                               int my_row, int row0, int row1, int unit, int position0) {
    using namespace device;
    constexpr int kBytes = bytes_of(C::T);
    const uint32_t thread = thread_index(), my_lane = lane();
    auto* places = reinterpret_cast<Vec4*>(memory);  // image, or none; i; j
    auto* sums = reinterpret_cast<float*>(memory + C::kPlaceBytes);
    for (int q = thread; q < C::kPositions; q += C::kThreads) {
        const int line = (position0 + q) / p.pitch, image = unit * p.unit_images + line / p.lines;
        const bool inside = line < p.unit_lines && image < p.images;
        places[q] = {static_cast<uint32_t>(inside ? image : -1), static_cast<uint32_t>(line % p.lines),
                     static_cast<uint32_t>((position0 + q) % p.pitch), 0};
    }
    const bool last = p.y_channel == 1;
    const int group0 = row0 / p.group_rows * p.group_rows, channel0 = row0 / p.group_rows * p.map_rows;
    SK_NO_UNROLL
    for (int strip = 0; strip < C::kLoads; ++strip) {
        if (strip) sync_block();  // the one before is written
        SK_UNROLL
        for (int r = 0; r < C::kRowsPer; ++r) {
            const int row = shuffle(my_row, r);
            SK_UNROLL
            for (int t = 0; t < C::kLoads; ++t) {
                if (t != strip || row < 0) continue;
                SK_UNROLL
                for (int u = 0; u < C::kPer; ++u) {
                    sums[(my_lane * C::kPer + u) * C::kPitch + row - row0] = acc[r][t * C::kPer + u];
                }
            }
        }
        sync_block();
        SK_NO_UNROLL
        for (int i = thread; i < C::kStrip * C::kRows; i += C::kThreads) {
            const int q = last ? i / C::kRows : i % C::kStrip, row = row0 + (last ? i % C::kRows : i / C::kStrip);
            const Vec4 place = places[strip * C::kStrip + q];
            const int image = static_cast<int>(place.x), at_i = static_cast<int>(place.y), at_j = place.z;
            if (row >= row1 || image < 0) continue;
            const ConvMap map = p.maps[(row - group0) / p.map_rows];
            const int channel = channel0 + (row - group0) % p.map_rows;
            if (at_i < map.i0 || at_i >= map.i1 || at_j < map.j0 || at_j >= map.j1) continue;
            const int64_t to = image * p.y_image + channel * p.y_channel + map.offset + int64_t{at_i} * map.stride_i +
                               int64_t{at_j} * map.stride_j;
            const RowEpilogue r = row_epilogue(p.epilogue, channel, true);
            const float out = scale_and_shift(r, 1.0f, sums[q * C::kPitch + row - row0]);
            store_one(p.epilogue, p.y + to * kBytes, 0, 0, 0, out);
        }
    }
}

template <class C>
SK_KERNEL(C::kThreads, C::kBlocks)
csr_conv(SK_PARAM Conv p) {
    using namespace device;
    constexpr Type T = C::T;
    char* memory = shared_memory();
    auto* flag = reinterpret_cast<uint32_t*>(memory + C::kSharedBytes - 16);
    const uint32_t thread = thread_index(), warp = warp_index(), my_lane = lane();
    const int tile = block_x() % p.tiles, unit = tile / p.unit_tiles, local = tile % p.unit_tiles;
    const Item item = p.items[block_x() / p.tiles];
    const int group = item.group / p.row_blocks;
    const int64_t source =
        unit * p.unit_stride + int64_t{group} * p.group_channels * p.channel_stride + int64_t{local} * C::kWords;

    // Lane r keeps row r of the warp and its bounds in the slice.
    const int my_row = p.order[(item.group * C::kRowsPer + static_cast<int>(my_lane % C::kRowsPer)) * C::kWarps + warp];
    const int32_t* my_starts = p.starts + int64_t{my_row < 0 ? 0 : my_row} * p.slices;
    const auto load = [&](int slice) {
        if (slice < item.end) {
            const int channel = slice * p.slice_channels, left = p.group_channels - channel;
            copy_planes<C>(p, memory + slice % 2 * C::kSliceBytes, source + channel * p.channel_stride,
                           left < p.slice_channels ? left : p.slice_channels);
        }
        commit_copies();
    };

    float acc[C::kRowsPer][C::kLoads * C::kPer] = {};
    int bound = item.begin < item.end ? my_starts[item.begin] : 0;
    load(item.begin);
    for (int slice = item.begin; slice < item.end; ++slice) {
        load(slice + 1);
        const int begin = bound, end = my_row < 0 ? bound : my_starts[slice + 1];
        bound = my_starts[slice + 1];
        wait_copies<1>();
        sync_block();  // everybody's copies are here
        const auto* words = reinterpret_cast<const uint32_t*>(memory + slice % 2 * C::kSliceBytes) + my_lane;
        int b = shuffle(begin, 0), e = shuffle(end, 0);
        Four<T> first{};
        if (b < e) first = load_nonzeros<T>(p, b & ~3);
        SK_UNROLL
        for (int r = 0; r < C::kRowsPer; ++r) {
            Four<T> now = first;
            const int from = b, to = e;
            if (r + 1 < C::kRowsPer) {
                b = shuffle(begin, r + 1);
                e = shuffle(end, r + 1);
                if (b < e) first = load_nonzeros<T>(p, b & ~3);
            }
            SK_NO_UNROLL
            for (int i = from & ~3; i < to; i += 4) {
                Four<T> next{};
                if (i + 4 < to) next = load_nonzeros<T>(p, i + 4);
                const auto add = [&](int j) {
                    const uint32_t* at = words + now.offset(j);
                    SK_UNROLL
                    for (int t = 0; t < C::kLoads; ++t) {
                        const uint32_t word = at[32 * t];
                        if constexpr (T == Type::f32) acc[r][t] += now.value(j) * bits_as<float>(word);
                        if constexpr (T == Type::bf16) {
                            acc[r][2 * t] += now.value(j) * bits_as<float>(word << 16);
                            acc[r][2 * t + 1] += now.value(j) * bits_as<float>(word & 0xFFFF0000u);
                        }
                        if constexpr (T == Type::f16) {
                            acc[r][2 * t] += now.value(j) * f16_to_float(static_cast<uint16_t>(word));
                            acc[r][2 * t + 1] += now.value(j) * f16_to_float(static_cast<uint16_t>(word >> 16));
                        }
                    }
                };
                if (i >= from && i + 4 <= to) {
                    SK_UNROLL
                    for (int j = 0; j < 4; ++j) add(j);
                } else {  // other rows' nonzeros are skipped, not multiplied by zero: X may hold infinities
                    SK_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        if (i + j >= from && i + j < to) add(j);
                    }
                }
                now = next;
            }
        }
        sync_block();  // everybody is done with the slice
    }

    if (item.parts > 1) {
        const auto slot = [&](int part) {
            return p.partials + (int64_t{item.slot + part} * p.tiles + tile) * C::kCount * C::kThreads + thread;
        };
        uint32_t* counter = p.counters + int64_t{item.counter} * p.tiles + tile;
        if (!add_parts<C::kCount, C::kThreads>(slot, item.part, item.parts, counter, &acc[0][0], thread, flag, 0)) {
            return;
        }
    }
    const int row0 = group * p.group_rows + item.group % p.row_blocks * C::kRows, end = (group + 1) * p.group_rows;
    store_positions<C>(p, memory, acc, my_row, row0, row0 + C::kRows < end ? row0 + C::kRows : end, unit,
                       local * C::kPositions);
}

}  // namespace sk::csr
