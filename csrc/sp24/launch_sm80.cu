// The kernels of sp24 that run on any card since Ampere (fp8: since Ada).
// SK_TYPE: 1 2 3 4
#include "decode.cuh"
#include "launch.cuh"
#include "mm_sm80.cuh"

namespace sk::sp24 {
namespace {
#define SK_ENTRY_MM(ROW_BLOCKS, TOKENS, WARP_TOKENS, STAGES) , MmSm80<T, ROW_BLOCKS, TOKENS, WARP_TOKENS, STAGES>
#define SK_ENTRY_DECODE(TOKENS, WARPS, STAGES) , Decode<T, TOKENS, WARPS, STAGES>
template <Type T>
using MmKernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_MM_SM80(SK_ENTRY_MM)>>()));
template <Type T>
using DecodeKernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_DECODE(SK_ENTRY_DECODE)>>()));
}  // namespace

template <int kType>
void list_mm_sm80(std::vector<KernelInfo>& to) {
    constexpr Type T = static_cast<Type>(kType);
    [&]<class... C>(std::tuple<C...>*) {
        (to.push_back(
             {"mm_sm80", C::kRows, C::kTokens, 1, C::kThreads, C::kSharedBytes, 2 * C::kRows * C::kTokens, 1, true}),
         ...);
    }(static_cast<MmKernels<T>*>(nullptr));
}

template <int kType>
void list_decode(std::vector<KernelInfo>& to) {
    constexpr Type T = static_cast<Type>(kType);
    [&]<class... C>(std::tuple<C...>*) {
        (to.push_back(
             {"decode", kBlockRows, C::kTokens, 1, C::kThreads, C::kSharedBytes, 2 * kBlockRows * C::kTokens, 1, true}),
         ...);
    }(static_cast<DecodeKernels<T>*>(nullptr));
}

template <int kType>
void run_mm_sm80(int index, const MmCall& call) {
    constexpr Type T = static_cast<Type>(kType);
    with_config<MmKernels<T>>(index, [&]<class C>() {
        const device::Shape shape{static_cast<unsigned>(call.workers), 1, C::kThreads, C::kSharedBytes};
        const Mm p = mm_parameters<T>(call);
        auto* kernel = sp24_mm_sm80<C, false>;
        if constexpr (device::is_wide(T)) kernel = p.images.kernel_w ? sp24_mm_sm80<C, true> : kernel;
        device::launch("sp24_mm_sm80", kernel, shape, call.stream, p);
    });
}

template <int kType>
void run_decode(int index, const MmCall& call) {
    constexpr Type T = static_cast<Type>(kType);
    with_config<DecodeKernels<T>>(index, [&]<class C>() {
        if (call.m > C::kTokens) throw std::runtime_error("sp24_decode: more tokens than the kernel has");
        if (call.images.kernel_w) throw std::runtime_error("sp24_decode takes no images");
        const device::Shape shape{static_cast<unsigned>(call.workers), 1, C::kThreads, C::kSharedBytes};
        device::launch("sp24_decode", sp24_decode<C>, shape, call.stream, mm_parameters<T>(call));
    });
}

template void list_mm_sm80<SK_TYPE>(std::vector<KernelInfo>& to);
template void run_mm_sm80<SK_TYPE>(int index, const MmCall& call);
template void list_decode<SK_TYPE>(std::vector<KernelInfo>& to);
template void run_decode<SK_TYPE>(int index, const MmCall& call);

}  // namespace sk::sp24
