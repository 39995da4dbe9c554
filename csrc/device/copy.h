// Data on its way: global and shared loads, cp.async, mbarriers, the tensor memory accelerator (TMA).
#pragma once
#include "numeric.h"

namespace sk::device {

// 16 bytes of read-only data that no other thread of the block needs.
SK_DEVICE Vec4 load_stream(const void* p) {
#if SK_GPU
    Vec4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    if (reinterpret_cast<uintptr_t>(p) % 16) emu::fail("a misaligned 16-byte load");
    Vec4 v;
    memcpy(&v, p, 16);
    return v;
#endif
}

SK_DEVICE uint32_t load_stream_word(const void* p) {
#if SK_GPU
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
#else
    if (reinterpret_cast<uintptr_t>(p) % 4) emu::fail("a misaligned 4-byte load");
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
#endif
}

SK_DEVICE void load_stream_words(uint32_t (&v)[2], const void* p) {
#if SK_GPU
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
#else
    if (reinterpret_cast<uintptr_t>(p) % 8) emu::fail("a misaligned 8-byte load");
    memcpy(v, p, 8);
#endif
}

// What another block of this launch has written and announced: past the first-level cache.
template <class T>
SK_DEVICE T load_announced(const T* p) {
#if SK_GPU
    return __ldcg(p);
#else
    return *p;
#endif
}

// A word or two at a shared address, and the 16 bits at one and a constant beyond it. Not moved across waits and
// barriers.
SK_DEVICE uint32_t load_shared_word(uint32_t shared) {
#if SK_GPU
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared));
    return v;
#else
    if (shared % 4) emu::fail("a misaligned 4-byte load");
    uint32_t v;
    memcpy(&v, emu::shared_pointer(shared), 4);
    return v;
#endif
}

SK_DEVICE void load_shared_words(uint32_t (&v)[2], uint32_t shared) {
#if SK_GPU
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(shared));
#else
    if (shared % 8) emu::fail("a misaligned 8-byte load");
    memcpy(v, emu::shared_pointer(shared), 8);
#endif
}

template <int kOffset>
SK_DEVICE uint32_t load_shared_half(uint32_t shared) {
#if SK_GPU
    uint32_t v;
    asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(v) : "r"(shared), "n"(kOffset));
    return v;
#else
    if ((shared + kOffset) % 2) emu::fail("a misaligned 2-byte load");
    uint16_t v;
    memcpy(&v, emu::shared_pointer(shared + kOffset), 2);
    return v;
#endif
}

// cp.async (sm_80 and later) -----------------------------------------------------------------------------------------

// kBytes (4, 8 or 16) from global to shared memory, zeros where `valid` is false. Lands at wait_copies.
template <int kBytes>
SK_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if SK_GPU
    const int bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global), "r"(bytes), "n"(kBytes)
                     : "memory");
    }
#else
    if (shared % kBytes || (valid && reinterpret_cast<uintptr_t>(global) % kBytes)) emu::fail("a misaligned cp.async");
    char* to = emu::shared_pointer(shared);
    emu::copy_later([to, global, valid] {
        if (valid) {
            memcpy(to, global, kBytes);
        } else {
            memset(to, 0, kBytes);
        }
    });
#endif
}

SK_DEVICE void commit_copies() {
#if SK_GPU
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu::commit_copies();
#endif
}

template <int kPending>
SK_DEVICE void wait_copies() {
#if SK_GPU
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
    emu::wait_copies(kPending);
#endif
}

// mbarriers (sm_90 and later) ---------------------------------------------------------------------------------------

#if !SK_GPU
namespace twin {
// Eight bytes, as on the hardware.
struct Barrier {
    uint16_t expected : 15;
    uint16_t phase : 1;
    uint16_t pending;
    int32_t bytes;

    void complete_if_due() {
        if (pending || bytes) return;
        phase ^= 1;
        pending = expected;
    }
    void arrive() {
        if (pending == 0) emu::fail("more arrivals at an mbarrier than it expects");
        --pending;
        complete_if_due();
    }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier(uint32_t address) {
    if (address % 8) emu::fail("a misaligned mbarrier");
    return *reinterpret_cast<Barrier*>(emu::shared_pointer(address));
}
}  // namespace twin
#endif

SK_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
#if SK_GPU
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
    twin::barrier(barrier) = {static_cast<uint16_t>(arrivals), 0, static_cast<uint16_t>(arrivals), 0};
#endif
}

// Makes the initial states visible to the copy engine and to the cluster; a barrier of the threads follows.
SK_DEVICE void fence_barrier_init() {
#if SK_GPU
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

SK_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
#if SK_GPU
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
    twin::barrier(barrier).bytes += static_cast<int32_t>(bytes);
    twin::barrier(barrier).arrive();
#endif
}

SK_DEVICE void barrier_arrive(uint32_t barrier) {
#if SK_GPU
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    twin::barrier(barrier).arrive();
#endif
}

// Arrives at the barrier in the same place of block `rank` of the cluster.
SK_DEVICE void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
#if SK_GPU
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
#else
    twin::barrier(emu::map_to_rank(barrier, rank)).arrive();
#endif
}

// Waits until the phase of this parity has ended.
SK_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
#if SK_GPU
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\n"
        "bra WAIT;\nDONE:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#else
    twin::Barrier* b = &twin::barrier(barrier);
    emu::wait_for("an mbarrier", [b, parity] { return b->phase != parity; });
#endif
}

// A place in a ring of stages, each with a barrier that is full and one that is empty, filled by a producer and drained
// by consumers: every thread has its own copy.
template <int kStages>
struct RingPlace {
    uint32_t stage = 0, phase = 0;
    SK_DEVICE uint32_t before() const { return stage == 0 ? kStages - 1 : stage - 1; }
    SK_DEVICE void next() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// `bytes` (a multiple of 16, as both addresses are) from global to shared memory; tells them to the barrier.
SK_DEVICE void load_bytes(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
#else
    if ((shared | bytes | reinterpret_cast<uintptr_t>(global)) % 16) emu::fail("a misaligned bulk copy");
    char* to = emu::shared_pointer(shared);
    if (bytes) emu::shared_pointer(shared + bytes - 1);
    twin::Barrier* done = &twin::barrier(barrier);
    emu::perform_later([=] {
        memcpy(to, global, bytes);
        done->bytes -= static_cast<int32_t>(bytes);
        done->complete_if_due();
    });
#endif
}

// Tensor maps: a matrix of rows, read in boxes of `box_rows` rows and 128 bytes, which land with the 128-byte swizzle
// (bits 4..6 of the address ^= bits 7..9). What lies outside of the matrix lands as zeros.
//
// Or images, channels innermost, whose pixels are the rows of a box (im2col mode of the PTX ISA). The box walks over
// the beginnings of windows: from `first` by `step` up to `last` along each row of windows, then along the rows, then
// to the next image; of every window it takes the same pixel, some rows and columns after the beginning. Pixels outside
// of their image land as zeros, and so do images beyond the last one.
#if SK_GPU
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
#else
struct alignas(64) TensorMap {
    const char* data;
    uint64_t row_bytes, rows, stride;  // bytes of a row, rows, bytes from row to row
    uint32_t box_rows;
    int height = 0, width = 0;  // of images
    int first_h = 0, first_w = 0, last_h = 0, last_w = 0, step_h = 1, step_w = 1;
};
#endif

// Where a box of pixels begins: its channel, the beginning of its first window, and the distance of the pixels from
// there (at most 255).
struct PixelBox {
    int32_t channel, column, row, image;
    uint16_t right, down;
};

#if !SK_GPU
namespace twin {
// Lands a box of `rows` rows of 128 bytes, byte(r, b), at `shared` in every block of `ranks`, and tells its barrier.
template <class Byte>
void land_box(uint32_t shared, uint32_t barrier_address, uint16_t ranks, uint32_t rows, Byte byte) {
    if (shared % 128) emu::fail("a TMA box needs a shared address that 128 divides");
    for (uint32_t rank = 0; rank < 16; ++rank) {
        if (!(ranks >> rank & 1)) continue;
        const uint32_t to = emu::map_to_rank(shared, rank), offset = to & 0xFFFFFF;
        Barrier* done = &barrier(emu::map_to_rank(barrier_address, rank));
        char* base = emu::shared_pointer(to) - offset;
        emu::perform_later([=] {
            for (uint32_t r = 0; r < rows; ++r) {
                for (uint32_t b = 0; b < 128; ++b) {
                    const uint32_t linear = offset + r * 128 + b, swizzled = linear ^ ((linear >> 7 & 7) << 4);
                    base[swizzled] = byte(r, b);
                }
            }
            done->bytes -= static_cast<int32_t>(rows * 128);
            done->complete_if_due();
        });
    }
}
}  // namespace twin
#endif

// Loads the box whose first byte is (`column_bytes`, `row`) to `shared` in every block of the cluster whose bit is set
// in `ranks`, and tells its bytes to the barrier in the same place there. `column` counts elements of `element_bytes`.
SK_DEVICE void load_box_multicast(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier,
                                  uint16_t ranks, [[maybe_unused]] int element_bytes) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
        : "memory");
#else
    const TensorMap m = *map;
    const int64_t from = int64_t{column} * element_bytes;
    twin::land_box(shared, barrier, ranks, m.box_rows, [=](uint32_t r, uint32_t b) {
        const int64_t y = int64_t{row} + r, x = from + b;
        const bool inside = y >= 0 && y < int64_t(m.rows) && x >= 0 && x < int64_t(m.row_bytes);
        return inside ? m.data[y * int64_t(m.stride) + x] : char{0};
    });
#endif
}

SK_DEVICE void load_box(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier,
                        [[maybe_unused]] int element_bytes) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
#else
    load_box_multicast(shared, map, column, row, barrier, static_cast<uint16_t>(1u << emu::cluster_rank()),
                       element_bytes);
#endif
}

// The same for a box of pixels.
SK_DEVICE void load_pixels_multicast(uint32_t shared, const TensorMap* map, const PixelBox& box, uint32_t barrier,
                                     uint16_t ranks, [[maybe_unused]] int element_bytes) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8}, %9;" ::"r"(shared),
        "l"(map), "r"(box.channel), "r"(box.column), "r"(box.row), "r"(box.image), "r"(barrier), "h"(box.right),
        "h"(box.down), "h"(ranks)
        : "memory");
#else
    const TensorMap m = *map;
    const int i = box.row - m.first_h, j = box.column - m.first_w;
    if (i < 0 || j < 0 || box.row > m.last_h || box.column > m.last_w || i % m.step_h || j % m.step_w) {
        emu::fail("a box of pixels begins at no window");
    }
    if (box.right > 255 || box.down > 255) emu::fail("a box of pixels is more than 255 pixels from its windows");
    const int64_t across = (m.last_w - m.first_w) / m.step_w + 1, down = (m.last_h - m.first_h) / m.step_h + 1;
    const int64_t begin = (box.image * down + i / m.step_h) * across + j / m.step_w;
    const int64_t images = int64_t(m.rows) / (int64_t{m.height} * m.width);
    twin::land_box(shared, barrier, ranks, m.box_rows, [=](uint32_t r, uint32_t b) {
        const int64_t window = begin + r, image = window / (across * down), inside = window % (across * down);
        const int64_t y = m.first_h + inside / across * m.step_h + box.down;
        const int64_t x = m.first_w + inside % across * m.step_w + box.right;
        const int64_t at = int64_t{box.channel} * element_bytes + b;
        const bool there = image < images && y >= 0 && y < m.height && x >= 0 && x < m.width && at >= 0;
        if (!there || at >= int64_t(m.row_bytes)) return char{0};
        return m.data[((image * m.height + y) * m.width + x) * int64_t(m.stride) + at];
    });
#endif
}

SK_DEVICE void load_pixels(uint32_t shared, const TensorMap* map, const PixelBox& box, uint32_t barrier,
                           [[maybe_unused]] int element_bytes) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(shared),
        "l"(map), "r"(box.channel), "r"(box.column), "r"(box.row), "r"(box.image), "r"(barrier), "h"(box.right),
        "h"(box.down)
        : "memory");
#else
    load_pixels_multicast(shared, map, box, barrier, static_cast<uint16_t>(1u << emu::cluster_rank()), element_bytes);
#endif
}

SK_DEVICE void prefetch_map([[maybe_unused]] const TensorMap* map) {
#if SK_GPU
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

}  // namespace sk::device
