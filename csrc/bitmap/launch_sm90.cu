// The sm_90a kernels of bitmap: compiled for that architecture alone.
#include "launch.cuh"
#include "mm_sm90.cuh"

namespace sk::bitmap {
namespace {
#define SK_ENTRY(TOKENS, GROUPS, STAGES) , MmSm90<T, TOKENS, GROUPS, STAGES>
template <Type T>
using Kernels = List<void SK_BITMAP_MM_SM90(SK_ENTRY)>;
}  // namespace

void list_mm_sm90(int type, std::vector<KernelInfo>& to) {
    with_type(type, [&]<Type T>() { Kernels<T>::describe(to, "sm90"); });
}

bool run_mm_sm90([[maybe_unused]] const MmCall& call) {
#ifdef SK_NO_KERNELS
    throw std::runtime_error("sparsekern was built without the sm_90a kernels");
#else
    bool found = false;
    with_type(call.type, [&]<Type T>() {
        found = Kernels<T>::call(call.kernel, call, [&]<class C>(const Mm& p) {
            if (p.x_align != 16) {
                throw std::runtime_error("bitmap_mm_sm90: every row of x must begin and end at a multiple of 16 bytes");
            }
            const auto map = device::tensor_map(p.x, T, p.k, p.m, p.x_stride, C::kTokens);
            device::launch("bitmap_mm_sm90", bitmap_mm_sm90<C>, shape_of<C>(call), call.stream, map, p);
        });
    });
    return found;
#endif
}

}  // namespace sk::bitmap
