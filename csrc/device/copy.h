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

// What another block of this launch has written and announced: past the first-level cache.
template <class T>
SK_DEVICE T load_announced(const T* p) {
#if SK_GPU
    return __ldcg(p);
#else
    return *p;
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

// Tensor maps: a matrix of rows, read in boxes of `box_rows` rows and 128 bytes, which land with the 128-byte swizzle
// (bits 4..6 of the address ^= bits 7..9). What lies outside of the matrix lands as zeros.
#if SK_GPU
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
#else
struct alignas(64) TensorMap {
    const char* data;
    uint64_t row_bytes, rows, stride;  // bytes of a row, rows, bytes from row to row
    uint32_t box_rows;
};
#endif

// Loads the box whose first byte is (`column_bytes`, `row`) to `shared` in every block of the cluster whose bit is set
// in `ranks`, and tells its bytes to the barrier in the same place there. `column` counts elements of `element_bytes`.
SK_DEVICE void load_box_multicast(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier,
                                  uint16_t ranks, int element_bytes);

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

SK_DEVICE void load_box_multicast(uint32_t shared, const TensorMap* map, int32_t column, int32_t row, uint32_t barrier,
                                  uint16_t ranks, [[maybe_unused]] int element_bytes) {
#if SK_GPU
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
        : "memory");
#else
    if (shared % 128) emu::fail("a TMA box needs a shared address that 128 divides");
    for (uint32_t rank = 0; rank < 16; ++rank) {
        if (!(ranks >> rank & 1)) continue;
        const uint32_t to = emu::map_to_rank(shared, rank), offset = to & 0xFFFFFF;
        twin::Barrier* done = &twin::barrier(emu::map_to_rank(barrier, rank));
        char* base = emu::shared_pointer(to) - offset;
        const TensorMap m = *map;
        const int64_t from = int64_t{column} * element_bytes;
        emu::perform_later([=] {
            for (uint32_t r = 0; r < m.box_rows; ++r) {
                for (uint32_t b = 0; b < 128; ++b) {
                    const int64_t y = int64_t{row} + r, x = from + b;
                    const bool inside = y >= 0 && y < int64_t(m.rows) && x >= 0 && x < int64_t(m.row_bytes);
                    const uint32_t linear = offset + r * 128 + b, swizzled = linear ^ ((linear >> 7 & 7) << 4);
                    base[swizzled] = inside ? m.data[y * int64_t(m.stride) + x] : 0;
                }
            }
            done->bytes -= static_cast<int32_t>(m.box_rows * 128);
            done->complete_if_due();
        });
    }
#endif
}

SK_DEVICE void prefetch_map([[maybe_unused]] const TensorMap* map) {
#if SK_GPU
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

}  // namespace sk::device
