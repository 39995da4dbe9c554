// The kernels of bitmap for every card, and the choice among all of them.
#include "expand.cuh"
#include "launch.cuh"
#include "mm_sm80.cuh"

namespace sk::bitmap {
namespace {
#define SK_ENTRY(TOKENS, WARPS, STAGES) , MmSm80<T, TOKENS, WARPS, STAGES>
template <Type T>
using Kernels = List<void SK_BITMAP_MM_SM80(SK_ENTRY)>;
#define SK_COUNT(...) +1
constexpr int kSm90Kernels = SK_BITMAP_MM_SM90(SK_COUNT);

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

template <bool kToDense>
void expand(const ExpandCall& c) {
    const Expand p{pointer<char>(c.values),
                   pointer<const uint8_t>(c.bits),
                   pointer<const int64_t>(c.offsets),
                   pointer<char>(c.dense),
                   c.n,
                   c.k,
                   (c.k + 7) / 8};
    constexpr int kRows = kExpandThreads / 32;
    const device::Shape shape{static_cast<unsigned>((c.n + kRows - 1) / kRows), 1, kExpandThreads, 0};
    if (device::bytes_of(static_cast<Type>(c.type)) == 4) {
        device::launch("bitmap_expand", bitmap_expand<uint32_t, kToDense>, shape, c.stream, p);
    } else {
        device::launch("bitmap_expand", bitmap_expand<uint16_t, kToDense>, shape, c.stream, p);
    }
}

}  // namespace

std::vector<KernelInfo> kernels(int type) {
    std::vector<KernelInfo> all;
    list_mm_sm90(type, all);
    with_type(type, [&]<Type T>() { Kernels<T>::describe(all, "sm80"); });
    return all;
}

void mm(const MmCall& c) {
    bool found = c.kernel < kSm90Kernels && run_mm_sm90(c);
    with_type(c.type, [&]<Type T>() {
        found = found || Kernels<T>::call(c.kernel - kSm90Kernels, c, [&]<class C>(const Mm& p) {
                    device::launch("bitmap_mm_sm80", bitmap_mm_sm80<C>, shape_of<C>(c), c.stream, p);
                });
    });
    if (!found) throw std::runtime_error("bitmap_mm: there is no kernel " + std::to_string(c.kernel));
}

void to_dense(const ExpandCall& call) { expand<true>(call); }
void from_dense(const ExpandCall& call) { expand<false>(call); }

}  // namespace sk::bitmap
