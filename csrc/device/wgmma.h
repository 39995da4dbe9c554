// A warpgroup's matrix products from registers and shared memory: wgmma.mma_async, dense and .sp (sm_90a).
//
// D[64, N] += A[64, K] B: A is in registers, warp w of the group holds rows 16 w .. 16 w + 15 as mma and mma.sp have
// them; B [N, K], K-major, lies in shared memory as 128-byte rows with the 128-byte swizzle. K is 64 / bytes where A is
// 2:4 sparse, 32 / bytes where it is dense.
// D: registers 4 j + 0, 1 are row 16 w + g, columns 8 j + 2t, + 1; registers 4 j + 2, 3 the same of row + 8.
// Asynchronous: D, A and the metadata may not be touched, nor B be overwritten, until wait_products.
#pragma once
#include "copy.h"
#if !SK_GPU
#include "twin.h"
#endif

namespace sk::device {

// Orders the threads' register accesses before the products that follow.
SK_DEVICE void fence_products() {
#if SK_GPU
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ordinary writes of shared memory before, reads by the tensor cores and the copy engine after; a barrier follows.
SK_DEVICE void fence_shared_writes() {
#if SK_GPU
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

SK_DEVICE void commit_products() {
#if SK_GPU
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emu::meet_warpgroup("wgmma.commit_group", nullptr, [](void**, void*) { emu::commit_products(); });
#endif
}

template <int kPending>
SK_DEVICE void wait_products() {
#if SK_GPU
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
    emu::meet_warpgroup("wgmma.wait_group", nullptr, [](void**, void*) { emu::wait_products(kPending); });
#endif
}

// The descriptor of a K-major operand with the 128-byte swizzle whose eight-row atoms follow each other.
SK_DEVICE uint64_t product_descriptor(uint32_t shared) {
    constexpr uint64_t kStride = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | kStride << 32 | uint64_t{1} << 16 | (shared & 0x3FFFF) >> 4;
}

// The descriptor of an operand whose rows in shared memory are its K: boxes of 64 columns (128 bytes), `box_bytes`
// apart, with the same swizzle. Eight rows are an atom of 1024 bytes.
SK_DEVICE uint64_t product_descriptor_columns(uint32_t shared, uint32_t box_bytes) {
    constexpr uint64_t kStride = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | kStride << 32 | uint64_t{box_bytes >> 4} << 16 | (shared & 0x3FFFF) >> 4;
}

#if SK_GPU
#define SK_OUT4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define SK_OUT16(C, i) SK_OUT4(C, i), SK_OUT4(C, i + 4), SK_OUT4(C, i + 8), SK_OUT4(C, i + 12)
#define SK_OUT64(C, i) SK_OUT16(C, i), SK_OUT16(C, i + 16), SK_OUT16(C, i + 32), SK_OUT16(C, i + 48)
#define SK_OUT8(C, i) SK_OUT4(C, i), SK_OUT4(C, i + 4)
#define SK_OUT32(C, i) SK_OUT16(C, i), SK_OUT16(C, i + 16)
#define SK_OUT128(C, i) SK_OUT64(C, i), SK_OUT64(C, i + 64)
#define SK_FLOAT(x) "+f"(x)
#define SK_INT(x) "+r"(x)
#define SK_REGISTERS8 "%0, %1, %2, %3"
#define SK_REGISTERS16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SK_REGISTERS32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SK_REGISTERS64                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SK_REGISTERS128                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63"
#define SK_REGISTERS256                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
    "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
    "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <Type T, int N, int kSelector>
struct SparseProduct;

// The types, the tail after the operands (scales of A and B, and B's orientation where 16-bit operands have one).
#define SK_PRODUCT(T, N, R, C, SHAPE, TYPES, TAIL, A0, A1, A2, A3, DESC, META, SEL, KEEP)                    \
    template <int kSelector>                                                                                 \
    struct SparseProduct<T, N, kSelector> {                                                                  \
        SK_DEVICE static void run(Accumulator<T> (&d)[R], const uint32_t (&a)[4], uint64_t b, uint32_t meta, \
                                  int accumulate) {                                                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP                                            \
                         ", 0;\n"                                                                            \
                         "wgmma.mma_async.sp.sync.aligned." SHAPE "." TYPES " {" SK_REGISTERS##N             \
                         "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " DESC ", " META ", " SEL ", p" TAIL ";\n}"   \
                         : SK_OUT##R(C, 0)                                                                   \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "n"(kSelector),    \
                           "r"(accumulate));                                                                 \
        }                                                                                                    \
    }
#define SK_PRODUCTS(N, R, ...)                                                                          \
    SK_PRODUCT(Type::bf16, N, R, SK_FLOAT, "m64n" #N "k32", "f32.bf16.bf16", ", 1, 1, 0", __VA_ARGS__); \
    SK_PRODUCT(Type::f16, N, R, SK_FLOAT, "m64n" #N "k32", "f32.f16.f16", ", 1, 1, 0", __VA_ARGS__);    \
    SK_PRODUCT(Type::e4m3, N, R, SK_FLOAT, "m64n" #N "k64", "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__);    \
    SK_PRODUCT(Type::i8, N, R, SK_INT, "m64n" #N "k64", "s32.s8.s8", "", __VA_ARGS__)
SK_PRODUCTS(8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11");
SK_PRODUCTS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15");
SK_PRODUCTS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23");
SK_PRODUCTS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39");
SK_PRODUCTS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71");
SK_PRODUCTS(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135");
#undef SK_PRODUCTS
#undef SK_PRODUCT

template <Type T, int N, int kSelector>
struct SparseProductShared;
#define SK_PRODUCT(T, N, R, C, SHAPE, TYPES, TAIL, DESC_A, DESC_B, META, SEL, KEEP)                                \
    template <int kSelector>                                                                                       \
    struct SparseProductShared<T, N, kSelector> {                                                                  \
        SK_DEVICE static void run(Accumulator<T> (&d)[R], uint64_t a, uint64_t b, uint32_t meta, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP                                                  \
                         ", 0;\n"                                                                                  \
                         "wgmma.mma_async.sp.sync.aligned." SHAPE "." TYPES " {" SK_REGISTERS##N                   \
                         "}, " DESC_A ", " DESC_B ", " META ", " SEL ", p" TAIL ";\n}"                             \
                         : SK_OUT##R(C, 0)                                                                         \
                         : "l"(a), "l"(b), "r"(meta), "n"(kSelector), "r"(accumulate));                            \
        }                                                                                                          \
    }
#define SK_PRODUCTS(N, R, ...)                                                                             \
    SK_PRODUCT(Type::bf16, N, R, SK_FLOAT, "m64n" #N "k32", "f32.bf16.bf16", ", 1, 1, 0, 0", __VA_ARGS__); \
    SK_PRODUCT(Type::f16, N, R, SK_FLOAT, "m64n" #N "k32", "f32.f16.f16", ", 1, 1, 0, 0", __VA_ARGS__);    \
    SK_PRODUCT(Type::e4m3, N, R, SK_FLOAT, "m64n" #N "k64", "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__);       \
    SK_PRODUCT(Type::i8, N, R, SK_INT, "m64n" #N "k64", "s32.s8.s8", "", __VA_ARGS__)
SK_PRODUCTS(64, 32, "%32", "%33", "%34", "%35", "%36");
SK_PRODUCTS(256, 128, "%128", "%129", "%130", "%131", "%132");
#undef SK_PRODUCTS
#undef SK_PRODUCT

template <Type T, int N>
struct DenseProduct;
#define SK_PRODUCT(T, N, R, TYPES, A0, A1, A2, A3, DESC, KEEP)                                                 \
    template <>                                                                                                \
    struct DenseProduct<T, N> {                                                                                \
        SK_DEVICE static void run(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int accumulate) {         \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                         "k16.f32." TYPES " {" SK_REGISTERS##N "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " DESC    \
                                                               ", p, 1, 1, 0;\n}"                              \
                         : SK_OUT##R(SK_FLOAT, 0)                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));               \
        }                                                                                                      \
    }
#define SK_PRODUCTS(N, R, ...)                              \
    SK_PRODUCT(Type::bf16, N, R, "bf16.bf16", __VA_ARGS__); \
    SK_PRODUCT(Type::f16, N, R, "f16.f16", __VA_ARGS__)
SK_PRODUCTS(8, 4, "%4", "%5", "%6", "%7", "%8", "%9");
SK_PRODUCTS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13");
SK_PRODUCTS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21");
SK_PRODUCTS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37");
SK_PRODUCTS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69");
#undef SK_PRODUCTS
#undef SK_PRODUCT

template <Type T>
SK_DEVICE void run_product_columns(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
#define SK_PRODUCT(TYPES)                                                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES \
                 " {" SK_REGISTERS256 "}, %128, %129, p, 1, 1, 1, 1;\n}"                                         \
                 : SK_OUT128(SK_FLOAT, 0)                                                                        \
                 : "l"(a), "l"(b), "r"(accumulate))
    if constexpr (T == Type::bf16) SK_PRODUCT("bf16.bf16");
    if constexpr (T == Type::f16) SK_PRODUCT("f16.f16");
#undef SK_PRODUCT
}
#endif

#if !SK_GPU
namespace twin {
// A product as one thread gives it; no metadata where A is dense. Registers are read when it is performed.
template <Type T>
struct Product {
    Accumulator<T>* d;
    const uint32_t *a, *meta;
    uint64_t shared_a, b;
    int accumulate;
};

// Element (row, column) of a K-major operand in shared memory, of rows of 128 bytes with the 128-byte swizzle.
template <Type T>
class SharedOperand {
public:
    explicit SharedOperand(uint64_t descriptor) : start_((descriptor & 0x3FFF) << 4) {
        if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3FFF) != 64) {
            emu::fail("wgmma: an operand is not in the 128-byte swizzle's atoms");
        }
        base_ = emu::shared_pointer(emu::map_to_rank(start_, emu::cluster_rank())) - start_;
    }
    uint32_t bits(int row, int column) const { return bits_at(row * 128 + column * bytes_of(T)); }
    uint32_t bits_at(uint32_t offset) const {
        const uint32_t linear = start_ + offset;
        uint32_t out = 0;
        memcpy(&out, base_ + (linear ^ (linear >> 7 & 7) << 4), bytes_of(T));
        return out;
    }

private:
    uint32_t start_;
    const char* base_;
};

// The same where rows are K (product_descriptor_columns); `row` still counts the other side.
template <Type T>
class SharedColumns {
public:
    explicit SharedColumns(uint64_t descriptor) : whole_(descriptor), box_((descriptor >> 16 & 0x3FFF) << 4) {}
    uint32_t bits(int row, int column) const {
        // Where that is among rows of 128 bytes: row 8 i + j of K, element `row` % 64.
        return whole_.bits_at(row / 64 * box_ + column * 128 + row % 64 * bytes_of(T));
    }

private:
    SharedOperand<T> whole_;
    uint32_t box_;
};

// Adds the product of the warpgroup's threads to the open group. dense(warp's first product, warp) is its A operand
// [16, k].
template <Type T, int N, class B = SharedOperand<T>, class Dense>
void multiply_later(void** slots, int k, Dense dense) {
    std::vector<Product<T>> all(128);
    for (int i = 0; i < 128; ++i) all[i] = *static_cast<Product<T>*>(slots[i]);
    for (const Product<T>& one : all) {
        if (one.b != all[0].b || one.shared_a != all[0].shared_a || one.accumulate != all[0].accumulate) {
            emu::fail("wgmma: threads disagree about the operands");
        }
    }
    const B b(all[0].b);
    // Until the wait nobody may look at D: whoever does finds poison. The first product in flight puts it there, and
    // takes it away again when it is performed.
    constexpr int kRegisters = N / 2;
    std::vector<Accumulator<T>> before;
    if (in_flight()[all[0].d]++ == 0) {
        for (const Product<T>& one : all) {
            before.insert(before.end(), one.d, one.d + kRegisters);
            for (int j = 0; j < kRegisters; ++j) one.d[j] = poison<Accumulator<T>>();
        }
    }
    emu::product_later([=] {
        in_flight()[all[0].d]--;
        for (size_t i = 0; i < before.size(); ++i) all[i / kRegisters].d[i % kRegisters] = before[i];
        for (int w = 0; w < 4; ++w) {
            const Product<T>* warp = all.data() + 32 * w;
            if (!warp->accumulate) {
                for (int lane = 0; lane < 32; ++lane) std::fill_n(warp[lane].d, kRegisters, Accumulator<T>{});
            }
            multiply<T>(
                dense(warp, w), k, N, [&](int k, int n) { return element<T>(b.bits(n, k)); },
                [&](int r, int c) -> Accumulator<T>& {
                    return warp[r % 8 * 4 + c % 8 / 2].d[4 * (c / 8) + 2 * (r / 8) + c % 2];
                });
        }
    });
}
}  // namespace twin
#endif

// Adds a product to the open group; d is overwritten where `accumulate` is 0. All 128 threads, after fence_products.
template <Type T, int N, int kSelector>
SK_DEVICE void product_sp(Accumulator<T> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, const uint32_t& meta,
                          int accumulate) {
    static_assert(is_wide(T) ? kSelector == 0 || kSelector == 1 : kSelector == 0);
#if SK_GPU
    SparseProduct<T, N, kSelector>::run(d, a, b, meta, accumulate);
#else
    twin::Product<T> slot{d, a, &meta, 0, b, accumulate};
    emu::meet_warpgroup("wgmma.mma_async.sp", &slot, [](void** slots, void*) {
        twin::multiply_later<T, N>(slots, twin::kSparseK<T>, [](const twin::Product<T>* warp, int) {
            return twin::expand_a<T>([&](int lane, int i) { return warp[lane].a[i]; },
                                     [&](int lane) { return *warp[lane].meta; }, kSelector);
        });
    });
#endif
}

// The same with A [64, 32 / bytes] in shared memory, as B is. No kernel takes it from there: it is what the road
// through registers is measured against.
template <Type T, int N, int kSelector>
SK_DEVICE void product_sp_shared(Accumulator<T> (&d)[N / 2], uint64_t a, uint64_t b, const uint32_t& meta,
                                 int accumulate) {
#if SK_GPU
    SparseProductShared<T, N, kSelector>::run(d, a, b, meta, accumulate);
#else
    twin::Product<T> slot{d, nullptr, &meta, a, b, accumulate};
    emu::meet_warpgroup("wgmma.mma_async.sp", &slot, [](void** slots, void*) {
        const twin::SharedOperand<T> a(static_cast<twin::Product<T>*>(slots[0])->shared_a);
        twin::multiply_later<T, N>(slots, twin::kSparseK<T>, [a](const twin::Product<T>* warp, int w) {
            constexpr int kPer = 4 / bytes_of(T);
            const auto word = [&](int lane, int i) {  // as the registers would have it
                uint32_t out = 0;
                for (int e = 0; e < kPer; ++e) {
                    const int row = 16 * w + 8 * (i % 2) + lane / 4, column = (4 * (i / 2) + lane % 4) * kPer + e;
                    out |= a.bits(row, column) << (8 * bytes_of(T) * e);
                }
                return out;
            };
            return twin::expand_a<T>(word, [&](int lane) { return *warp[lane].meta; }, kSelector);
        });
    });
#endif
}

// A dense A of 16-bit floats from registers.
template <Type T, int N>
SK_DEVICE void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    static_assert(is_wide(T));
#if SK_GPU
    DenseProduct<T, N>::run(d, a, b, accumulate);
#else
    twin::Product<T> slot{d, a, nullptr, 0, b, accumulate};
    emu::meet_warpgroup("wgmma.mma_async", &slot, [](void** slots, void*) {
        twin::multiply_later<T, N>(slots, 16, [](const twin::Product<T>* warp, int) {
            return twin::dense_a<T>([&](int lane, int i) { return warp[lane].a[i]; });
        });
    });
#endif
}

// D[64, 256] += A[64, 16] B, dense 16-bit floats, both from shared memory with K as their rows
// (product_descriptor_columns); A's descriptor is that of one box.
template <Type T>
SK_DEVICE void product_columns(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    static_assert(is_wide(T));
#if SK_GPU
    run_product_columns<T>(d, a, b, accumulate);
#else
    twin::Product<T> slot{d, nullptr, nullptr, a, b, accumulate};
    emu::meet_warpgroup("wgmma.mma_async", &slot, [](void** slots, void*) {
        const twin::SharedColumns<T> a(static_cast<twin::Product<T>*>(slots[0])->shared_a);
        twin::multiply_later<T, 256, twin::SharedColumns<T>>(slots, 16, [a](const twin::Product<T>*, int w) {
            std::vector<float> dense(16 * 16);
            for (int i = 0; i < 256; ++i) dense[i] = twin::element<T>(a.bits(16 * w + i / 16, i % 16));
            return dense;
        });
    });
#endif
}

}  // namespace sk::device
