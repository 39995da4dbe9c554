// The gradients of sp24 on sm_90a: compiled for that architecture alone.
// SK_TYPE: 1 2
#include "launch.cuh"
#include "mm_t_sm90.cuh"
#include "sddmm_sm90.cuh"

namespace sk::sp24 {
namespace {
constexpr Type kType = static_cast<Type>(SK_TYPE);
#define SK_MM_T(TOKENS, STAGES, CLUSTER) , MmTSm90<kType, TOKENS, STAGES, CLUSTER>
#define SK_SDDMM(STAGES, CLUSTER) , SddmmSm90<kType, STAGES, CLUSTER>
using MmTKernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_MM_T_SM90(SK_MM_T)>>()));
using SddmmKernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_SDDMM_SM90(SK_SDDMM)>>()));
constexpr int kMmT = static_cast<int>(std::tuple_size_v<MmTKernels>);

template <class C>
constexpr KernelInfo info(const char* family, int tokens) {
    return {family,
            C::kCluster * C::kRows,
            tokens,
            C::kCluster,
            C::kThreads,
            C::kSharedBytes,
            2 * C::kCluster * C::kRows * tokens,
            C::kCluster * C::kWarpgroups,
            true};
}

#ifdef SK_NO_KERNELS
[[noreturn]] void not_built() { throw std::runtime_error("sparsekern was built without the sm_90a kernels"); }
#else
template <class C>
device::Shape shape(int workers) {
    return {static_cast<unsigned>(workers * C::kCluster), C::kCluster, C::kThreads, C::kSharedBytes};
}
#endif
}  // namespace

template <>
void list_gradients<SK_TYPE>(std::vector<KernelInfo>& to) {
    [&]<class... C>(std::tuple<C...>*) {
        (to.push_back(info<C>("mm_t_sm90", C::kTokens)), ...);
    }(static_cast<MmTKernels*>(nullptr));
    [&]<class... C>(std::tuple<C...>*) {
        (to.push_back(info<C>("sddmm_sm90", C::kColumns)), ...);
    }(static_cast<SddmmKernels*>(nullptr));
}

template <>
int resident_gradients<SK_TYPE>([[maybe_unused]] int index) {
    int clusters = 0;
#ifndef SK_NO_KERNELS
    if (index < kMmT) {
        with_config<MmTKernels>(index, [&]<class C>() {
            clusters = device::resident_clusters("sp24_mm_t_sm90", sp24_mm_t_sm90<C>, shape<C>(1));
        });
    } else {
        with_config<SddmmKernels>(index - kMmT, [&]<class C>() {
            clusters = device::resident_clusters("sp24_sddmm_sm90", sp24_sddmm_sm90<C>, shape<C>(1));
        });
    }
#endif
    return clusters;
}

template <>
void run_mm_t<SK_TYPE>([[maybe_unused]] int index, [[maybe_unused]] const MmCall& call) {
#ifdef SK_NO_KERNELS
    not_built();
#else
    with_config<MmTKernels>(index, [&]<class C>() {
        const Mm p = mm_parameters<kType>(call);
        if (p.images.kernel_w || call.out_type != call.type) {
            throw std::runtime_error("sp24_mm_t: a gradient is a matrix of the operands' type");
        }
        if ((call.x | static_cast<uint64_t>(call.x_stride) * 2) % 16) {
            throw std::runtime_error("sp24_mm_t_sm90: every row of dy must begin at a multiple of 16 bytes");
        }
        const auto map = device::tensor_map(p.x, kType, p.k, p.m, p.x_stride, C::kTokens / C::kCluster);
        device::launch("sp24_mm_t_sm90", sp24_mm_t_sm90<C>, shape<C>(call.workers), call.stream, map, p);
    });
#endif
}

template <>
void run_sddmm<SK_TYPE>([[maybe_unused]] int index, [[maybe_unused]] const SddmmCall& c) {
#ifdef SK_NO_KERNELS
    not_built();
#else
    with_config<SddmmKernels>(index - kMmT, [&]<class C>() {
        if ((c.dy | c.x | static_cast<uint64_t>(c.dy_stride | c.x_stride) * 2) % 16) {
            throw std::runtime_error("sp24_sddmm_sm90: every row of dy and x must begin at a multiple of 16 bytes");
        }
        Sddmm p{};
        p.metadata = reinterpret_cast<const uint8_t*>(c.metadata);
        p.values = reinterpret_cast<uint32_t*>(c.values);
        p.metadata_stride = c.metadata_stride;
        p.pairs = c.pairs;
        p.n = c.n;
        p.k = c.k;
        p.k_blocks = (c.m + C::kTokens - 1) / C::kTokens;
        p.streamed = c.streamed;
        p.partials = reinterpret_cast<float*>(c.partials);
        p.counters = reinterpret_cast<uint32_t*>(c.counters);
        if (!device::fits(p.streamed, p.k_blocks, c.workers)) {
            throw std::runtime_error("sp24_sddmm: too much work for one launch");
        }
        const auto dy = device::tensor_map(reinterpret_cast<void*>(c.dy), kType, c.n, c.m, c.dy_stride, C::kTokens);
        const auto x = device::tensor_map(reinterpret_cast<void*>(c.x), kType, c.k, c.m, c.x_stride, C::kTokens);
        device::launch("sp24_sddmm_sm90", sp24_sddmm_sm90<C>, shape<C>(c.workers), c.stream, dy, x, p);
    });
#endif
}

}  // namespace sk::sp24
