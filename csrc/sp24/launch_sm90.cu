// The sm_90a kernels of sp24: compiled for that architecture alone.
// SK_TYPE: 1 2 3 4
#include "launch.cuh"
#include "mm_sm90.cuh"

namespace sk::sp24 {
namespace {
#define SK_ENTRY(M, TOKENS, STAGES, CLUSTER) , MmSm90<T, M, TOKENS, STAGES, CLUSTER>
#define SK_ENTRY_PROMOTING(M, TOKENS, STAGES, CLUSTER) , MmSm90<T, M, TOKENS, STAGES, CLUSTER, true>
template <Type T>
using Kernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_MM_SM90(SK_ENTRY)>>()));
template <Type T>
using PromotingKernels =
    decltype(rest_of(std::declval<std::tuple<void* SK_SP24_MM_SM90_PROMOTING(SK_ENTRY_PROMOTING)>>()));

template <class... C>
void list(std::vector<KernelInfo>& to, std::tuple<C...>*) {
    (to.push_back({"mm_sm90", C::kCluster * C::kRows, C::kTokens, C::kCluster, C::kThreads, C::kSharedBytes,
                   2 * C::kCluster * C::kRows * C::kTokens, C::kCluster * C::kWarpgroups,
                   C::T != Type::e4m3 || C::kPromotes}),
     ...);
}

template <class Tuple>
void run([[maybe_unused]] int index, [[maybe_unused]] const MmCall& call) {
#ifdef SK_NO_KERNELS
    throw std::runtime_error("sparsekern was built without the sm_90a kernels");
#else
    with_config<Tuple>(index, [&]<class C>() {
        const Mm p = mm_parameters<C::T>(call);
        if ((call.x | static_cast<uint64_t>(call.x_stride) * device::bytes_of(C::T)) % 16) {
            throw std::runtime_error("sp24_mm_sm90: every row of x must begin at a multiple of 16 bytes");
        }
        const device::Images& g = p.images;
        if (g.kernel_w && g.channels % block_k(C::T)) {
            throw std::runtime_error("sp24_mm_sm90: a block of K must lie inside one tap");
        }
        constexpr int kBox = C::kTokens / C::kCluster;
        const auto map = g.kernel_w
                             ? device::image_map(p.x, C::T, g, p.m / (int64_t{g.out_h} * g.out_w), p.x_stride, kBox)
                             : device::tensor_map(p.x, C::T, p.k, p.m, p.x_stride, kBox);
        const device::Shape shape{static_cast<unsigned>(call.workers * C::kCluster), C::kCluster, C::kThreads,
                                  C::kSharedBytes};
        device::launch("sp24_mm_sm90", sp24_mm_sm90<C>, shape, call.stream, map, p);
    });
#endif
}

template <class Tuple>
int resident([[maybe_unused]] int index) {
    int clusters = 0;
#ifndef SK_NO_KERNELS
    with_config<Tuple>(index, [&]<class C>() {
        const device::Shape shape{C::kCluster, C::kCluster, C::kThreads, C::kSharedBytes};
        clusters = device::resident_clusters("sp24_mm_sm90", sp24_mm_sm90<C>, shape);
    });
#endif
    return clusters;
}

constexpr Type kType = static_cast<Type>(SK_TYPE);
}  // namespace

template <>
void list_mm_sm90<SK_TYPE>(std::vector<KernelInfo>& to) {
    list(to, static_cast<Kernels<kType>*>(nullptr));
}

template <>
void run_mm_sm90<SK_TYPE>(int index, const MmCall& call) {
    run<Kernels<kType>>(index, call);
}

template <>
int resident_mm_sm90<SK_TYPE>(int index) {
    return resident<Kernels<kType>>(index);
}

#if SK_TYPE == 4
template <>
void list_mm_sm90_promoting<SK_TYPE>(std::vector<KernelInfo>& to) {
    list(to, static_cast<PromotingKernels<kType>*>(nullptr));
}

template <>
void run_mm_sm90_promoting<SK_TYPE>(int index, const MmCall& call) {
    run<PromotingKernels<kType>>(index, call);
}

template <>
int resident_mm_sm90_promoting<SK_TYPE>(int index) {
    return resident<PromotingKernels<kType>>(index);
}
#endif

}  // namespace sk::sp24
