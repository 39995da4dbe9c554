// The sm_90a kernels of sp24: compiled for that architecture alone.
// SK_TYPE: 1 2 3 4
#include "launch.cuh"
#include "mm_sm90.cuh"

namespace sk::sp24 {
namespace {
#define SK_ENTRY(M, TOKENS, STAGES, CLUSTER) , MmSm90<T, M, TOKENS, STAGES, CLUSTER>
template <Type T>
using Kernels = decltype(rest_of(std::declval<std::tuple<void* SK_SP24_MM_SM90(SK_ENTRY)>>()));
}  // namespace

template <int kType>
void list_mm_sm90(std::vector<KernelInfo>& to) {
    constexpr Type T = static_cast<Type>(kType);
    [&]<class... C>(std::tuple<C...>*) {
        (to.push_back({"mm_sm90", C::kCluster * C::kRows, C::kTokens, C::kCluster, C::kThreads, C::kSharedBytes,
                       2 * C::kCluster * C::kRows * C::kTokens, C::kCluster * C::kWarpgroups}),
         ...);
    }(static_cast<Kernels<T>*>(nullptr));
}

template <int kType>
void run_mm_sm90([[maybe_unused]] int index, [[maybe_unused]] const MmCall& call) {
#ifdef SK_NO_KERNELS
    throw std::runtime_error("sparsekern was built without the sm_90a kernels");
#else
    constexpr Type T = static_cast<Type>(kType);
    with_config<Kernels<T>>(index, [&]<class C>() {
        const Mm p = mm_parameters<T>(call);
        if ((call.x | static_cast<uint64_t>(call.x_stride) * device::bytes_of(T)) % 16) {
            throw std::runtime_error("sp24_mm_sm90: every row of x must begin at a multiple of 16 bytes");
        }
        const device::Images& g = p.images;
        if (g.kernel_w && g.channels % block_k(T)) {
            throw std::runtime_error("sp24_mm_sm90: a block of K must lie inside one tap");
        }
        constexpr int kBox = C::kTokens / C::kCluster;
        const auto map = g.kernel_w ? device::image_map(p.x, T, g, p.m / (int64_t{g.out_h} * g.out_w), p.x_stride, kBox)
                                    : device::tensor_map(p.x, T, p.k, p.m, p.x_stride, kBox);
        const device::Shape shape{static_cast<unsigned>(call.workers * C::kCluster), C::kCluster, C::kThreads,
                                  C::kSharedBytes};
        device::launch("sp24_mm_sm90", sp24_mm_sm90<C>, shape, call.stream, map, p);
    });
#endif
}

template void list_mm_sm90<SK_TYPE>(std::vector<KernelInfo>& to);
template void run_mm_sm90<SK_TYPE>(int index, const MmCall& call);

}  // namespace sk::sp24
