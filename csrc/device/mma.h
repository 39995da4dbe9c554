// A warp's matrix products and the loads that feed them: mma.sp (sm_80 and later), mma, ldmatrix, stmatrix.
//
// With g = lane / 4 and t = lane % 4, as the PTX ISA has it. A: rows g (registers 0, 2) and g + 8 (1, 3). B: column g.
// D: registers 0, 1 are row g, columns 2t and 2t + 1; registers 2, 3 the same of row g + 8.
#pragma once
#include "numeric.h"
#if !SK_GPU
#include "twin.h"
#endif

namespace sk::device {

// D += A B with a 2:4 sparse A [16, 64 / bytes], B [64 / bytes, 8]. Metadata in ascending ("ordered") form. For 16-bit
// types the selector says whether lanes t = 0, 1 (0) or t = 2, 3 (1) hold it, for 8-bit types all lanes do.
template <Type T, int kSelector>
SK_DEVICE void mma_sp(Accumulator<T>* d, const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
    static_assert(is_wide(T) ? kSelector == 0 || kSelector == 1 : kSelector == 0);
#if SK_GPU
#define SK_MMA_SP(SHAPE, TYPES, C)                                                                                    \
    asm volatile("mma.sp::ordered_metadata.sync.aligned." SHAPE ".row.col." TYPES                                     \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"               \
                 : "+" C(d[0]), "+" C(d[1]), "+" C(d[2]), "+" C(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), \
                   "n"(kSelector))
    if constexpr (T == Type::bf16) SK_MMA_SP("m16n8k32", "f32.bf16.bf16.f32", "f");
    if constexpr (T == Type::f16) SK_MMA_SP("m16n8k32", "f32.f16.f16.f32", "f");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
    if constexpr (T == Type::e4m3) SK_MMA_SP("m16n8k64", "f32.e4m3.e4m3.f32", "f");
#else
    // fp8 came with Ada; Hopper has it in wgmma alone and sm_100 in tcgen05, where mma.sp would convert it to 16 bits.
    // Launchers know.
    if constexpr (T == Type::e4m3) unreachable();
#endif
    if constexpr (T == Type::i8) SK_MMA_SP("m16n8k64", "s32.s8.s8.s32", "r");
#undef SK_MMA_SP
#else
    struct Slot {
        Accumulator<T>* d;
        const uint32_t *a, *b;
        uint32_t meta;
    } slot{d, a, b, meta};
    emu::meet_warp("mma.sp", &slot, [](void** slots, void*) {
        const auto of = [&](int lane) { return static_cast<Slot*>(slots[lane]); };
        constexpr int kPer = 4 / bytes_of(T);
        const auto dense = twin::expand_a<T>([&](int lane, int i) { return of(lane)->a[i]; },
                                             [&](int lane) { return of(lane)->meta; }, kSelector);
        twin::multiply<T>(
            dense, twin::kSparseK<T>, 8,
            [&](int k, int n) {
                return twin::element_of<T>(of(n * 4 + k % (4 * kPer) / kPer)->b[k / (4 * kPer)], k % kPer);
            },
            [&](int r, int c) -> Accumulator<T>& { return of(r % 8 * 4 + c / 2)->d[2 * (r / 8) + c % 2]; });
    });
#endif
}

// D += A B with a dense A [16, 32 / bytes], B [32 / bytes, 8].
template <Type T>
SK_DEVICE void mma(Accumulator<T>* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if SK_GPU
#define SK_MMA(SHAPE, TYPES, C)                                                     \
    asm volatile("mma.sync.aligned." SHAPE ".row.col." TYPES                        \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+" C(d[0]), "+" C(d[1]), "+" C(d[2]), "+" C(d[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (T == Type::bf16) SK_MMA("m16n8k16", "f32.bf16.bf16.f32", "f");
    if constexpr (T == Type::f16) SK_MMA("m16n8k16", "f32.f16.f16.f32", "f");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    if constexpr (T == Type::e4m3) SK_MMA("m16n8k32", "f32.e4m3.e4m3.f32", "f");
#else
    if constexpr (T == Type::e4m3) __trap();
#endif
    if constexpr (T == Type::i8) SK_MMA("m16n8k32", "s32.s8.s8.s32", "r");
#undef SK_MMA
#else
    struct Slot {
        Accumulator<T>* d;
        const uint32_t *a, *b;
    } slot{d, a, b};
    emu::meet_warp("mma", &slot, [](void** slots, void*) {
        const auto of = [&](int lane) { return static_cast<Slot*>(slots[lane]); };
        constexpr int kPer = 4 / bytes_of(T);
        const auto dense = twin::dense_a<T>([&](int lane, int i) { return of(lane)->a[i]; });
        twin::multiply<T>(
            dense, 8 * kPer, 8,
            [&](int k, int n) {
                return twin::element_of<T>(of(n * 4 + k % (4 * kPer) / kPer)->b[k / (4 * kPer)], k % kPer);
            },
            [&](int r, int c) -> Accumulator<T>& { return of(r % 8 * 4 + c / 2)->d[2 * (r / 8) + c % 2]; });
    });
#endif
}

// Four 8 x 16-byte matrices: lane i names row i % 8 of matrix i / 8, and gets word t of row g of each.
SK_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t shared) {
#if SK_GPU
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
#else
    struct Slot {
        uint32_t* r;
        const char* row;
    } slot{r, emu::shared_pointer(shared)};
    if (shared % 16) emu::fail("a misaligned ldmatrix row");
    emu::meet_warp("ldmatrix", &slot, [](void** slots, void*) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int m = 0; m < 4; ++m) {
                const char* row = static_cast<Slot*>(slots[8 * m + lane / 4])->row;
                memcpy(static_cast<Slot*>(slots[lane])->r + m, row + lane % 4 * 4, 4);
            }
        }
    });
#endif
}

// An 8 x 8 matrix of 16-bit elements transposed: the lane's word is row g, columns 2t and 2t + 1, before and after.
SK_DEVICE uint32_t transpose_matrix(uint32_t word) {
#if SK_GPU
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
    return out;
#else
    struct Slot {
        uint32_t in, out;
    } slot{word, 0};
    emu::meet_warp("movmatrix", &slot, [](void** slots, void*) {
        for (int lane = 0; lane < 32; ++lane) {
            uint32_t out = 0;
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4, column = lane % 4 * 2 + half;  // of the result
                const uint32_t from = static_cast<Slot*>(slots[column * 4 + row / 2])->in;
                out |= (from >> (16 * (row % 2)) & 0xFFFF) << (16 * half);
            }
            static_cast<Slot*>(slots[lane])->out = out;
        }
    });
    return slot.out;
#endif
}

// Four 8 x 8 matrices of 16-bit elements, transposed on their way (sm_90 and later): the lane's word of matrix m holds
// row g, columns 2t and 2t + 1; lane i names where COLUMN i % 8 of matrix i / 8 goes, as 16 bytes.
SK_DEVICE void store_matrices_transposed(uint32_t shared, const uint32_t (&r)[4]) {
#if SK_GPU
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    struct Slot {
        const uint32_t* r;
        char* row;
    } slot{r, emu::shared_pointer(shared)};
    if (shared % 16) emu::fail("a misaligned stmatrix row");
    emu::meet_warp("stmatrix", &slot, [](void** slots, void*) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int m = 0; m < 4; ++m) {
                const uint32_t word = static_cast<Slot*>(slots[lane])->r[m];
                for (int half = 0; half < 2; ++half) {
                    char* column = static_cast<Slot*>(slots[8 * m + lane % 4 * 2 + half])->row;
                    const auto bits = static_cast<uint16_t>(word >> (16 * half));
                    memcpy(column + lane / 4 * 2, &bits, 2);
                }
            }
        }
    });
#endif
}

}  // namespace sk::device
