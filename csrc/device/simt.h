// Who a thread is and how threads meet. Each wrapper here and in the other headers of this folder has two bodies: the
// instruction for nvcc, and a twin with the same meaning for the emulator (tests/emulator), which g++ compiles. Kernels
// use nothing but these words, so the very same templates run in both.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SK_GPU 1
#define SK_DEVICE __device__ __forceinline__
#define SK_ANYWHERE __host__ __device__ __forceinline__
#define SK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SK_PARAM const __grid_constant__
#define SK_UNROLL _Pragma("unroll")
#define SK_UNROLL_2 _Pragma("unroll 2")
#define SK_NO_UNROLL _Pragma("unroll 1")
#else
#include <cstring>

#include "engine.h"
#define SK_GPU 0
#define SK_DEVICE inline
#define SK_ANYWHERE inline
#define SK_KERNEL(threads, blocks) void
#define SK_PARAM const
#define SK_UNROLL
#define SK_UNROLL_2
#define SK_NO_UNROLL
#endif

namespace sk::device {

#if SK_GPU
SK_DEVICE uint32_t thread_index() { return threadIdx.x; }
SK_DEVICE uint32_t block_x() { return blockIdx.x; }
SK_DEVICE uint32_t block_y() { return blockIdx.y; }
SK_DEVICE uint32_t grid_x() { return gridDim.x; }
SK_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char sk_shared[];
    return sk_shared;
}
SK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#else
SK_DEVICE uint32_t thread_index() { return emu::thread_index(); }
SK_DEVICE uint32_t block_x() { return emu::block_index().x; }
SK_DEVICE uint32_t block_y() { return emu::block_index().y; }
SK_DEVICE uint32_t grid_x() { return emu::grid_size().x; }
SK_DEVICE char* shared_memory() { return emu::shared_memory(); }
SK_DEVICE uint32_t shared_address(const void* p) { return emu::shared_address(p); }
#endif

SK_DEVICE uint32_t lane() { return thread_index() & 31; }

// The warp's index as a value that the compiler knows to be the same in all its lanes.
SK_DEVICE uint32_t warp_index() {
#if SK_GPU
    return __shfl_sync(0xffffffff, threadIdx.x >> 5, 0);
#else
    return thread_index() >> 5;
#endif
}

SK_DEVICE void sync_block() {
#if SK_GPU
    __syncthreads();
#else
    emu::block_barrier(0, emu::block_threads());
#endif
}

// Barrier 1..15 of the block, for `threads` of its threads (a multiple of 32).
SK_DEVICE void sync_named(uint32_t id, uint32_t threads) {
#if SK_GPU
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emu::block_barrier(id, threads);
#endif
}

SK_DEVICE void sync_warp() {
#if SK_GPU
    __syncwarp();
#else
    emu::meet_warp("syncwarp", nullptr, [](void**, void*) {});
#endif
}

// The value of the lane whose index differs by `mask`.
template <class T>
SK_DEVICE T shuffle_xor(T value, uint32_t mask) {
#if SK_GPU
    return __shfl_xor_sync(0xffffffff, value, mask);
#else
    struct Slot {
        T in, out;
        uint32_t mask;
    } slot{value, value, mask};
    emu::meet_warp("shuffle_xor", &slot, [](void** slots, void*) {
        for (uint32_t i = 0; i < 32; ++i) {
            auto* mine = static_cast<Slot*>(slots[i]);
            mine->out = static_cast<Slot*>(slots[i ^ mine->mask])->in;
        }
    });
    return slot.out;
#endif
}

// The value of lane `source`.
template <class T>
SK_DEVICE T shuffle(T value, uint32_t source) {
#if SK_GPU
    return __shfl_sync(0xffffffff, value, source);
#else
    struct Slot {
        T in, out;
        uint32_t source;
    } slot{value, value, source};
    emu::meet_warp("shuffle", &slot, [](void** slots, void*) {
        for (uint32_t i = 0; i < 32; ++i) {
            auto* mine = static_cast<Slot*>(slots[i]);
            mine->out = static_cast<Slot*>(slots[mine->source & 31])->in;
        }
    });
    return slot.out;
#endif
}

// One bit per lane whose predicate holds.
SK_DEVICE uint32_t vote(bool predicate) {
#if SK_GPU
    return __ballot_sync(0xffffffff, predicate);
#else
    struct Slot {
        bool in;
        uint32_t out;
    } slot{predicate, 0};
    emu::meet_warp("vote", &slot, [](void** slots, void*) {
        uint32_t bits = 0;
        for (uint32_t i = 0; i < 32; ++i) bits |= uint32_t{static_cast<Slot*>(slots[i])->in} << i;
        for (uint32_t i = 0; i < 32; ++i) static_cast<Slot*>(slots[i])->out = bits;
    });
    return slot.out;
#endif
}

SK_DEVICE uint32_t count_bits(uint32_t bits) {
#if SK_GPU
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

// Clusters (sm_90 and later) ---------------------------------------------------------------------------------------

SK_DEVICE uint32_t cluster_rank() {
#if SK_GPU
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return emu::cluster_rank();
#endif
}

SK_DEVICE void sync_cluster() {
#if SK_GPU
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    emu::cluster_barrier();
#endif
}

// Bytes of shared memory that a block may have on the architecture that is compiled for. Launchers refuse what needs
// more (cudaFuncSetAttribute does), so that such a kernel is compiled to `unreachable` and nothing else.
#if !defined(__CUDA_ARCH__)
constexpr int kMostShared = 227 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kMostShared = 163 * 1024;
#elif __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200
constexpr int kMostShared = 99 * 1024;
#else
constexpr int kMostShared = 227 * 1024;
#endif

SK_DEVICE void unreachable() {
#if SK_GPU
    __trap();
#else
    emu::fail("a kernel for another architecture");
#endif
}

// Registers move between warpgroups: each of its threads then has `kCount` of them.
template <int kCount>
SK_DEVICE void keep_registers() {
#if SK_GPU
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
SK_DEVICE void take_registers() {
#if SK_GPU
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Memory accesses stay on their side of this place in the code.
SK_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// Global memory between blocks -------------------------------------------------------------------------------------

// All writes of the block so far before the count, the count before all later reads: returns the count until now.
// Called by one thread, after a barrier of those whose writes it announces.
SK_DEVICE uint32_t announce(uint32_t* counter) {
#if SK_GPU
    __threadfence();
    const uint32_t before = atomicAdd(counter, 1u);
    __threadfence();
    return before;
#else
    return (*counter)++;
#endif
}

// *p becomes the smaller of *p and `value`.
SK_DEVICE void keep_smallest(uint64_t* p, uint64_t value) {
#if SK_GPU
    atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
#else
    if (value < *p) *p = value;
#endif
}

}  // namespace sk::device
