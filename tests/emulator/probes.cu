// Each instruction of the device vocabulary alone, raw registers in and out: tests/test_device.py compares the emulator
// with dense definitions, and on a GPU the emulator with the hardware.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/device/copy.h"
#include "../../csrc/device/launch.h"
#include "../../csrc/device/mma.h"
#include "../../csrc/device/wgmma.h"

namespace py = pybind11;
using namespace sk::device;

namespace {

// a [32][4], b [32][4], meta [32] words; d [32][4] in and out.
template <Type T, int kSelector>
SK_KERNEL(32, 1)
probe_mma_sp(const uint32_t* a, const uint32_t* b, const uint32_t* meta, void* d) {
    uint32_t ra[4], rb[4];
    Accumulator<T> rd[4];
    const uint32_t i = lane();
    for (int j = 0; j < 4; ++j) {
        ra[j] = a[4 * i + j];
        rb[j] = b[4 * i + j];
        rd[j] = static_cast<Accumulator<T>*>(d)[4 * i + j];
    }
    mma_sp<T, kSelector>(rd, ra, rb, meta[i]);
    for (int j = 0; j < 4; ++j) static_cast<Accumulator<T>*>(d)[4 * i + j] = rd[j];
}

template <Type T>
SK_KERNEL(32, 1)
probe_mma(const uint32_t* a, const uint32_t* b, void* d) {
    const uint32_t i = lane();
    uint32_t ra[4], rb[2] = {b[2 * i], b[2 * i + 1]};
    Accumulator<T> rd[4];
    for (int j = 0; j < 4; ++j) {
        ra[j] = a[4 * i + j];
        rd[j] = static_cast<Accumulator<T>*>(d)[4 * i + j];
    }
    mma<T>(rd, ra, rb);
    for (int j = 0; j < 4; ++j) static_cast<Accumulator<T>*>(d)[4 * i + j] = rd[j];
}

// a [128][4], meta [128]; b: N rows of 128 bytes, swizzled already; d [128][N / 2]. Two steps, the second at byte 64.
template <Type T, int N>
SK_KERNEL(128, 1)
probe_product(const uint32_t* a, const uint32_t* meta, const uint32_t* b, void* d) {
    char* memory = shared_memory();
    const uint32_t i = thread_index();
    for (int j = i; j < N * 32; j += 128) reinterpret_cast<uint32_t*>(memory)[j] = b[j];
    fence_shared_writes();
    sync_block();
    uint32_t first[4], second[4];
    Accumulator<T> rd[N / 2];
    for (int j = 0; j < 4; ++j) {
        first[j] = a[4 * i + j];
        second[j] = a[512 + 4 * i + j];
    }
    const uint32_t words[2] = {meta[i], meta[128 + i]};
    const uint64_t at = product_descriptor(shared_address(memory));
    fence_products();
    product_sp<T, N, 0>(rd, first, at, words[0], 0);
    product_sp<T, N, is_wide(T) ? 1 : 0>(rd, second, at + 4, words[1], 1);
    commit_products();
    wait_products<0>();
    for (int j = 0; j < N / 2; ++j) static_cast<Accumulator<T>*>(d)[i * (N / 2) + j] = rd[j];
}

// The same sparse products with A [64] rows of 128 bytes, swizzled, in shared memory behind B.
template <Type T, int N>
SK_KERNEL(128, 1)
probe_product_shared(const uint32_t* a, const uint32_t* meta, const uint32_t* b, void* d) {
    char* memory = shared_memory();
    const uint32_t i = thread_index();
    for (int j = i; j < N * 32; j += 128) reinterpret_cast<uint32_t*>(memory)[j] = b[j];
    for (int j = i; j < 64 * 32; j += 128) reinterpret_cast<uint32_t*>(memory + N * 128)[j] = a[j];
    fence_shared_writes();
    sync_block();
    Accumulator<T> rd[N / 2];
    const uint32_t words[2] = {meta[i], meta[128 + i]};
    const uint64_t at_b = product_descriptor(shared_address(memory));
    const uint64_t at_a = product_descriptor(shared_address(memory + N * 128));
    fence_products();
    product_sp_shared<T, N, 0>(rd, at_a, at_b, words[0], 0);
    product_sp_shared<T, N, is_wide(T) ? 1 : 0>(rd, at_a + 2, at_b + 4, words[1], 1);
    commit_products();
    wait_products<0>();
    for (int j = 0; j < N / 2; ++j) static_cast<Accumulator<T>*>(d)[i * (N / 2) + j] = rd[j];
}

// Dense: a [4][128][4], four steps of 32 bytes. The second half is a group of its own, towards other accumulators.
template <Type T, int N>
SK_KERNEL(128, 1)
probe_dense_product(const uint32_t* a, const uint32_t* b, float* d) {
    char* memory = shared_memory();
    const uint32_t i = thread_index();
    for (int j = i; j < N * 32; j += 128) reinterpret_cast<uint32_t*>(memory)[j] = b[j];
    fence_shared_writes();
    sync_block();
    uint32_t ra[4][4];
    float low[N / 2], high[N / 2];
    for (int j = 0; j < 16; ++j) ra[j / 4][j % 4] = a[512 * (j / 4) + 4 * i + j % 4];
    const uint64_t at = product_descriptor(shared_address(memory));
    fence_products();
    product<T, N>(low, ra[0], at, 0);
    product<T, N>(low, ra[1], at + 2, 1);
    commit_products();
    product<T, N>(high, ra[2], at + 4, 0);
    product<T, N>(high, ra[3], at + 6, 1);
    commit_products();
    wait_products<1>();
    for (int j = 0; j < N / 2; ++j) d[i * (N / 2) + j] = low[j];
    wait_products<0>();
    for (int j = 0; j < N / 2; ++j) d[128 * (N / 2) + i * (N / 2) + j] = high[j];
}

// a [32 tokens][64], b four boxes of [32 tokens][64]: rows of 128 bytes, swizzled; d [128][128] of two steps.
template <Type T>
SK_KERNEL(128, 1)
probe_product_columns(const uint32_t* a, const uint32_t* b, float* d) {
    char* memory = shared_memory();
    constexpr int kBox = 32 * 128;
    const uint32_t i = thread_index();
    for (int j = i; j < kBox / 4; j += 128) reinterpret_cast<uint32_t*>(memory)[j] = a[j];
    for (int j = i; j < kBox; j += 128) reinterpret_cast<uint32_t*>(memory + kBox)[j] = b[j];
    fence_shared_writes();
    sync_block();
    float rd[128];
    const uint64_t at_a = product_descriptor_columns(shared_address(memory), kBox);
    const uint64_t at_b = product_descriptor_columns(shared_address(memory + kBox), kBox);
    fence_products();
    product_columns<T>(rd, at_a, at_b, 0);
    product_columns<T>(rd, at_a + (2048 >> 4), at_b + (2048 >> 4), 1);
    commit_products();
    wait_products<0>();
    for (int j = 0; j < 128; ++j) d[i * 128 + j] = rd[j];
}

// `rounds` rounds of eight sparse products of 64 x 256 x 64 bytes from the same operands (zeros), by two warpgroups a
// block, A from registers or from shared memory: how fast they are is for a clock outside.
template <Type T, bool kShared>
SK_KERNEL(256, 1)
probe_rate(int rounds, void* out) {
    char* memory = shared_memory();
    const uint32_t i = thread_index();
    for (int j = i; j < (256 + 64) * 32; j += 256) reinterpret_cast<uint32_t*>(memory)[j] = 0;
    fence_shared_writes();
    sync_block();
    Accumulator<T> d[128] = {};
    const uint32_t a[4] = {}, meta = 0x44444444;
    const uint64_t at_b = product_descriptor(shared_address(memory));
    const uint64_t at_a = product_descriptor(shared_address(memory + 256 * 128));
    SK_NO_UNROLL
    for (int round = 0; round < rounds; ++round) {
        fence_products();
        SK_UNROLL
        for (int j = 0; j < 8; ++j) {
            if constexpr (kShared) {
                product_sp_shared<T, 256, 0>(d, at_a + 2 * (j % 4), at_b + 4 * (j % 2), meta, 1);
            } else {
                product_sp<T, 256, 0>(d, a, at_b + 4 * (j % 2), meta, 1);
            }
        }
        commit_products();
        wait_products<1>();
    }
    wait_products<0>();
    for (int j = 0; j < 128; ++j) static_cast<Accumulator<T>*>(out)[(block_x() * 256 + i) * 128 + j] = d[j];
}

// in [32][4] -> matrices stored transposed at the lanes' rows -> loaded by ldmatrix -> out [32][4]; also movmatrix of
// in.
SK_KERNEL(32, 1) probe_matrices(const uint32_t* in, uint32_t* stored, uint32_t* loaded, uint32_t* moved) {
    char* memory = shared_memory();
    const uint32_t i = lane();
    uint32_t r[4] = {in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]};
    store_matrices_transposed(shared_address(memory + 16 * i), r);
    sync_warp();
    for (int j = 0; j < 4; ++j) stored[4 * i + j] = reinterpret_cast<const uint32_t*>(memory)[4 * i + j];
    load_matrices(r, shared_address(memory + 16 * i));
    for (int j = 0; j < 4; ++j) {
        loaded[4 * i + j] = r[j];
        moved[4 * i + j] = transpose_matrix(in[4 * i + j]);
    }
}

SK_KERNEL(32, 1) probe_warp(const uint32_t* in, uint32_t* out) {
    const uint32_t i = lane(), value = in[i];
    out[i] = shuffle_xor(value, 5);
    out[32 + i] = shuffle(value, (i * 7 + 3) & 31);
    out[64 + i] = vote(value & 1);
    out[96 + i] = count_bits(value);
    out[128 + i] = pack_pair<Type::bf16>(bits_as<float>(value), bits_as<float>(in[31 - i]));
    out[160 + i] = pack_pair<Type::f16>(bits_as<float>(value), bits_as<float>(in[31 - i]));
}

// 32 pieces of kBytes, the odd ones invalid: they land as zeros.
template <int kBytes>
SK_KERNEL(32, 1)
probe_copy(const char* in, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t i = lane();
    copy_async<kBytes>(shared_address(memory + kBytes * i), in + kBytes * i, i % 2 == 0);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    for (int j = i; j < 8 * kBytes; j += 32) out[j] = reinterpret_cast<const uint32_t*>(memory)[j];
}

// 32 words from each of the two roads past the first-level cache; permutations, dot products, loads of shared memory.
SK_KERNEL(32, 1) probe_words(const uint32_t* in, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t i = lane(), value = load_stream_word(in + i), other = in[31 - i];
    const Vec4 v = load_stream(in + 4 * (i % 8));
    reinterpret_cast<uint32_t*>(memory)[i] = value;
    sync_warp();
    out[i] = value;
    out[32 + i] = v.x ^ v.y ^ v.z ^ v.w;
    uint32_t two[2];
    load_stream_words(two, in + 2 * (i % 16));
    out[32 + i] ^= two[0] - two[1];
    out[64 + i] = permute_bytes(value, other, 0x7250);
    out[96 + i] = permute_bytes(value, other, (in[i] & 0x7777) | 0xABCD0000);
    out[128 + i] = dot_bytes(value, other, 1000);
    out[160 + i] = dot_halves<false>(value, other, 1000);
    out[192 + i] = dot_halves<true>(value, other, 1000);
    out[224 + i] = load_shared_word(shared_address(memory) + 4 * (31 - i));
    out[256 + i] =
        load_shared_half<2>(shared_address(memory) + 4 * i) << 16 | load_shared_half<0>(shared_address(memory) + 4 * i);
    load_shared_words(two, shared_address(memory) + 8 * (i % 16));
    out[288 + i] = two[0] - two[1];
}

// Two groups of copies, waited for one by one.
SK_KERNEL(32, 1) probe_groups(const uint32_t* in, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t i = lane();
    for (int group = 0; group < 2; ++group) {
        copy_async<4>(shared_address(memory + 128 * group + 4 * i), in + 32 * group + i, true);
        commit_copies();
    }
    wait_copies<1>();
    out[i] = *reinterpret_cast<uint32_t*>(memory + 4 * i);
    wait_copies<0>();
    out[32 + i] = *reinterpret_cast<uint32_t*>(memory + 128 + 4 * i);
}

// Two warps each meet at a barrier of their own: a word of the other warp's, written before it.
SK_KERNEL(128, 1) probe_named(const uint32_t* in, uint32_t* out) {
    auto* memory = reinterpret_cast<uint32_t*>(shared_memory());
    const uint32_t i = thread_index(), half = i / 64;
    for (int round = 0; round < 3; ++round) {
        memory[i] = in[i] + round;
        sync_named(1 + half, 64);
        out[128 * round + i] = memory[i ^ 32];
        sync_named(1 + half, 64);
    }
}

// A ring of two stages: warp 1 of each block of a cluster fills its own, by a bulk copy and a box of 8 rows; a stage is
// empty when warp 0 of both blocks has said so. Every round goes to out[block][round].
constexpr int kRingBytes = 1024 + 64;
SK_KERNEL(64, 1) probe_ring(SK_PARAM TensorMap map, const char* in, int rounds, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t full = shared_address(memory + 4096), empty = full + 16, rank = cluster_rank();
    if (thread_index() == 0) {
        for (int s = 0; s < 2; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2);
        }
        fence_barrier_init();
    }
    sync_cluster();
    RingPlace<2> place;
    for (int round = 0; round < rounds; ++round, place.next()) {
        char* stage = memory + 2048 * place.stage;
        if (thread_index() == 32) {
            barrier_wait(empty + 8 * place.stage, place.phase ^ 1);
            barrier_expect(full + 8 * place.stage, kRingBytes);
            load_box(shared_address(stage), &map, 0, 8 * (2 * round + rank), full + 8 * place.stage, 2);
            load_bytes(shared_address(stage + 1024), in + 64 * (2 * round + rank), 64, full + 8 * place.stage);
        }
        if (warp_index() == 0) {
            barrier_wait(full + 8 * place.stage, place.phase);
            for (int j = lane(); j < kRingBytes / 4; j += 32) {
                out[(rank * rounds + round) * (kRingBytes / 4) + j] = reinterpret_cast<const uint32_t*>(stage)[j];
            }
            sync_warp();
            if (lane() < 2) barrier_arrive_at(empty + 8 * place.stage, lane());
        }
    }
    sync_cluster();
}

// Each block announces itself; the smallest of all numbers, each kept once a block.
SK_KERNEL(32, 1) probe_counts(const uint64_t* in, uint32_t* counter, uint32_t* order, uint64_t* smallest) {
    if (lane() == 0) {
        order[block_x()] = announce(counter);
        keep_smallest(smallest, in[block_x()]);
    }
}

// A cluster of two: each block loads its half of a box of 16 rows to both. out [2][16 * 32] words as they lie in
// memory.
SK_KERNEL(32, 1) probe_box(SK_PARAM TensorMap map, int column, int row, int bytes, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t barrier = shared_address(memory + 2048), rank = cluster_rank();
    if (thread_index() == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    sync_cluster();
    if (thread_index() == 0) {
        barrier_expect(barrier, 2048);
        load_box_multicast(shared_address(memory + rank * 1024), &map, column, row + rank * 8, barrier, 3, bytes);
    }
    barrier_wait(barrier, 0);
    for (int j = lane(); j < 512; j += 32) out[512 * rank + j] = reinterpret_cast<const uint32_t*>(memory)[j];
    sync_cluster();
}

// The same with 16 pixels: each block loads a box of 8 to both.
SK_KERNEL(32, 1) probe_pixels(SK_PARAM TensorMap map, PixelBox first, PixelBox second, int bytes, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t barrier = shared_address(memory + 2048), rank = cluster_rank();
    if (thread_index() == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    sync_cluster();
    if (thread_index() == 0) {
        barrier_expect(barrier, 2048);
        load_pixels_multicast(shared_address(memory + rank * 1024), &map, rank ? second : first, barrier, 3, bytes);
    }
    barrier_wait(barrier, 0);
    for (int j = lane(); j < 512; j += 32) out[512 * rank + j] = reinterpret_cast<const uint32_t*>(memory)[j];
    sync_cluster();
}

// One block, 8 pixels, no multicast.
SK_KERNEL(32, 1) probe_pixels_alone(SK_PARAM TensorMap map, PixelBox box, int bytes, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t barrier = shared_address(memory + 1024);
    if (thread_index() == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    sync_block();
    if (thread_index() == 0) {
        barrier_expect(barrier, 1024);
        load_pixels(shared_address(memory), &map, box, barrier, bytes);
    }
    barrier_wait(barrier, 0);
    for (int j = lane(); j < 256; j += 32) out[j] = reinterpret_cast<const uint32_t*>(memory)[j];
}

SK_KERNEL(32, 1) probe_divide(Divisor divisor, const uint32_t* in, uint32_t* out) {
    out[lane()] = divisor.divide(in[lane()]);
}

// What the emulator must refuse. 0: waits for an arrival that never comes; 1: a diverged warp; 2: one arrival too many;
// 3: reads what no wait has brought; 4: writes beyond shared memory; 5: reads an accumulator before the wait; 6: its
// threads wait at different barriers.
SK_KERNEL(128, 1) probe_mistake(int which, uint32_t* out) {
    char* memory = shared_memory();
    const uint32_t barrier = shared_address(memory), i = thread_index();
    if (i == 0) barrier_init(barrier, 1);
    sync_block();
    if (which == 0) barrier_wait(barrier, 0);
    if (which == 6) {
        if (i % 3 == 0) barrier_wait(barrier, 0);
        sync_block();
    }
    if (which == 1 && i < 32) {
        if (i < 16) {
            sync_warp();
        } else {
            out[i] = vote(true);
        }
    }
    if (which == 2 && i == 0) {
        barrier_expect(barrier, 16);
        barrier_arrive(barrier);
    }
    if (which == 3) {
        copy_async<4>(shared_address(memory + 64 + 4 * i), out + i, true);
        commit_copies();
        const uint32_t early = *reinterpret_cast<uint32_t*>(memory + 64 + 4 * i);
        wait_copies<0>();
        out[i] = early;
    }
    if (which == 4 && i == 0) memory[1024] = 1;
    if (which == 5) {
        float d[4] = {1, 1, 1, 1};
        const uint32_t a[4] = {}, meta = 0x44444444;
        fence_products();
        product_sp<Type::bf16, 8, 0>(d, a, product_descriptor(shared_address(memory)), meta, 1);
        commit_products();
        out[i] = bits_as<uint32_t>(d[0]);
        wait_products<0>();
    }
}

template <class P>
P* at(uint64_t address) {
    return reinterpret_cast<P*>(address);
}

template <class F>
void with_type(int type, F f) {
    switch (static_cast<Type>(type)) {
        case Type::bf16: return f.template operator()<Type::bf16>();
        case Type::f16: return f.template operator()<Type::f16>();
        case Type::i8: return f.template operator()<Type::i8>();
        default: return f.template operator()<Type::e4m3>();
    }
}

}  // namespace

void bind_probes(py::module_& m) {
    m.def("probe_mma_sp", [](int type, int selector, uint64_t a, uint64_t b, uint64_t meta, uint64_t d) {
        with_type(type, [&]<Type T>() {
            auto* kernel = probe_mma_sp<T, 0>;
            if constexpr (is_wide(T)) kernel = selector ? probe_mma_sp<T, 1> : kernel;
            launch("mma_sp", kernel, {1, 1, 32, 0}, 0, at<const uint32_t>(a), at<const uint32_t>(b),
                   at<const uint32_t>(meta), at<void>(d));
        });
    });
    m.def("probe_mma", [](int type, uint64_t a, uint64_t b, uint64_t d) {
        with_type(type, [&]<Type T>() {
            launch("mma", probe_mma<T>, {1, 1, 32, 0}, 0, at<const uint32_t>(a), at<const uint32_t>(b), at<void>(d));
        });
    });
    m.def("probe_product", [](int type, int n, uint64_t a, uint64_t meta, uint64_t b, uint64_t d) {
        with_type(type, [&]<Type T>() {
            auto* kernel = n == 8     ? probe_product<T, 8>
                           : n == 16  ? probe_product<T, 16>
                           : n == 32  ? probe_product<T, 32>
                           : n == 64  ? probe_product<T, 64>
                           : n == 128 ? probe_product<T, 128>
                                      : probe_product<T, 256>;
            launch("product", kernel, {1, 1, 128, static_cast<size_t>(n) * 128}, 0, at<const uint32_t>(a),
                   at<const uint32_t>(meta), at<const uint32_t>(b), at<void>(d));
        });
    });
    m.def("probe_product_shared", [](int type, int n, uint64_t a, uint64_t meta, uint64_t b, uint64_t d) {
        with_type(type, [&]<Type T>() {
            auto* kernel = n == 64 ? probe_product_shared<T, 64> : probe_product_shared<T, 256>;
            launch("product", kernel, {1, 1, 128, (static_cast<size_t>(n) + 64) * 128}, 0, at<const uint32_t>(a),
                   at<const uint32_t>(meta), at<const uint32_t>(b), at<void>(d));
        });
    });
    m.def("probe_dense_product", [](int type, int n, uint64_t a, uint64_t b, uint64_t d) {
        const auto run = [&]<Type T>() {
            auto* kernel = n == 8    ? probe_dense_product<T, 8>
                           : n == 16 ? probe_dense_product<T, 16>
                           : n == 32 ? probe_dense_product<T, 32>
                                     : probe_dense_product<T, 64>;
            launch("product", kernel, {1, 1, 128, static_cast<size_t>(n) * 128}, 0, at<const uint32_t>(a),
                   at<const uint32_t>(b), at<float>(d));
        };
        if (static_cast<Type>(type) == Type::bf16) return run.template operator()<Type::bf16>();
        run.template operator()<Type::f16>();
    });
    m.def("probe_product_columns", [](int type, uint64_t a, uint64_t b, uint64_t d) {
        auto* kernel = static_cast<Type>(type) == Type::bf16 ? probe_product_columns<Type::bf16>
                                                             : probe_product_columns<Type::f16>;
        launch("columns", kernel, {1, 1, 128, 5 * 4096}, 0, at<const uint32_t>(a), at<const uint32_t>(b), at<float>(d));
    });
    m.def("probe_rate", [](int type, bool shared, int blocks, int rounds, uint64_t out, uint64_t stream) {
        with_type(type, [&]<Type T>() {
            auto* kernel = shared ? probe_rate<T, true> : probe_rate<T, false>;
            launch("rate", kernel, {static_cast<unsigned>(blocks), 1, 256, (256 + 64) * 128}, stream, rounds,
                   at<void>(out));
        });
    });
    m.def("probe_words", [](uint64_t in, uint64_t out) {
        launch("words", probe_words, {1, 1, 32, 128}, 0, at<const uint32_t>(in), at<uint32_t>(out));
    });
    m.def("probe_groups", [](uint64_t in, uint64_t out) {
        launch("groups", probe_groups, {1, 1, 32, 256}, 0, at<const uint32_t>(in), at<uint32_t>(out));
    });
    m.def("probe_named", [](uint64_t in, uint64_t out) {
        launch("named", probe_named, {1, 1, 128, 512}, 0, at<const uint32_t>(in), at<uint32_t>(out));
    });
    m.def("probe_ring", [](uint64_t matrix, uint64_t bytes, int rounds, uint64_t out) {
        const TensorMap map = tensor_map(at<void>(matrix), Type::bf16, 64, 16 * rounds, 64, 8);
        launch("ring", probe_ring, {2, 2, 64, 4096 + 32}, 0, map, at<const char>(bytes), rounds, at<uint32_t>(out));
    });
    m.def("probe_counts", [](int blocks, uint64_t in, uint64_t counter, uint64_t order, uint64_t smallest) {
        launch("counts", probe_counts, {static_cast<unsigned>(blocks), 1, 32, 0}, 0, at<const uint64_t>(in),
               at<uint32_t>(counter), at<uint32_t>(order), at<uint64_t>(smallest));
    });
    m.def("probe_matrices", [](uint64_t in, uint64_t stored, uint64_t loaded, uint64_t moved) {
        launch("matrices", probe_matrices, {1, 1, 32, 512}, 0, at<const uint32_t>(in), at<uint32_t>(stored),
               at<uint32_t>(loaded), at<uint32_t>(moved));
    });
    m.def("probe_warp", [](uint64_t in, uint64_t out) {
        launch("warp", probe_warp, {1, 1, 32, 0}, 0, at<const uint32_t>(in), at<uint32_t>(out));
    });
    m.def("probe_copy", [](int bytes, uint64_t in, uint64_t out) {
        auto* kernel = bytes == 4 ? probe_copy<4> : bytes == 8 ? probe_copy<8> : probe_copy<16>;
        launch("copy", kernel, {1, 1, 32, 512}, 0, at<const char>(in), at<uint32_t>(out));
    });
    m.def("probe_box", [](int type, uint64_t data, int64_t columns, int64_t rows, int64_t stride, int column, int row,
                          uint64_t out) {
        const TensorMap map = tensor_map(at<void>(data), static_cast<Type>(type), columns, rows, stride, 8);
        launch("box", probe_box, {2, 2, 32, 2048 + 8}, 0, map, column, row, bytes_of(static_cast<Type>(type)),
               at<uint32_t>(out));
    });
    // fields: of Images; boxes: channel, column, row, image, right, down of each block's.
    m.def("probe_pixels", [](int type, uint64_t data, const std::vector<int>& fields, int64_t count, int64_t stride,
                             const std::vector<int>& boxes, uint64_t out, uint64_t alone) {
        const int* f = fields.data();
        const Images g{f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11]};
        const auto box = [&](int at) {
            const int* b = boxes.data() + at;
            const auto right = static_cast<uint16_t>(b[4]), down = static_cast<uint16_t>(b[5]);
            return PixelBox{b[0], b[1], b[2], b[3], right, down};
        };
        const int bytes = bytes_of(static_cast<Type>(type));
        const TensorMap map = image_map(at<void>(data), static_cast<Type>(type), g, count, stride, 8);
        launch("pixels", probe_pixels, {2, 2, 32, 2048 + 8}, 0, map, box(0), box(6), bytes, at<uint32_t>(out));
        launch("pixels", probe_pixels_alone, {1, 1, 32, 1024 + 8}, 0, map, box(0), bytes, at<uint32_t>(alone));
    });
    m.def("probe_divide", [](uint32_t by, uint64_t in, uint64_t out) {
        launch("divide", probe_divide, {1, 1, 32, 0}, 0, Divisor::by(by), at<const uint32_t>(in), at<uint32_t>(out));
    });
    m.def("probe_mistake", [](int which, uint64_t out) {
        launch("mistake", probe_mistake, {which == 6 ? 2u : 1u, 1, 128, 1024}, 0, which, at<uint32_t>(out));
    });
}

#if SK_GPU
PYBIND11_MODULE(_probes, m) { bind_probes(m); }  // the emulator has them in its own module
#endif
