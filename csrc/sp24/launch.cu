// The list of sp24's kernels, and the call that finds its own in it.
#include <stdexcept>

#include "kernels.cuh"

namespace sk::sp24 {

// Calls f.template operator()<kType>() for a run-time operand type: bf16, fp16, int8, e4m3.
template <class F>
static void with_type(int type, F f) {
    switch (type) {
        case 1: return f.template operator()<1>();
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
        case 4: return f.template operator()<4>();
        default: throw std::runtime_error("sp24: no kernel for operands of type " + std::to_string(type));
    }
}

std::vector<KernelInfo> kernels(int type) {
    std::vector<KernelInfo> all;
    with_type(type, [&]<int kType>() {
        list_mm_sm90<kType>(all);
        list_mm_sm80<kType>(all);
        list_decode<kType>(all);
        if constexpr (kType == 4) list_mm_sm90_promoting<kType>(all);
        if constexpr (kType <= 2) list_gradients<kType>(all);
    });
    return all;
}

#define SK_COUNT(...) +1
constexpr int kSm90 = 0 SK_SP24_MM_SM90(SK_COUNT), kSm80 = kSm90 SK_SP24_MM_SM80(SK_COUNT);
constexpr int kDecode = kSm80 SK_SP24_DECODE(SK_COUNT);

int resident(int type, int kernel) {
    int clusters = 0;
    with_type(type, [&]<int kType>() {
        if (kernel < kSm90) clusters = resident_mm_sm90<kType>(kernel);
        if constexpr (kType == 4) {
            if (kernel >= kDecode) clusters = resident_mm_sm90_promoting<kType>(kernel - kDecode);
        }
        if constexpr (kType <= 2) {
            if (kernel >= kDecode) clusters = resident_gradients<kType>(kernel - kDecode);
        }
    });
    return clusters;
}

void mm(const MmCall& call) {
    with_type(call.type, [&]<int kType>() {
        if (call.kernel < kSm90) return run_mm_sm90<kType>(call.kernel, call);
        if (call.kernel < kSm80) return run_mm_sm80<kType>(call.kernel - kSm90, call);
        if constexpr (kType == 4) {
            if (call.kernel >= kDecode) return run_mm_sm90_promoting<kType>(call.kernel - kDecode, call);
        }
        if constexpr (kType <= 2) {
            if (call.kernel >= kDecode) return run_mm_t<kType>(call.kernel - kDecode, call);
        }
        run_decode<kType>(call.kernel - kSm80, call);
    });
}

void sddmm(const SddmmCall& call) {
    switch (call.type) {
        case 1: return run_sddmm<1>(call.kernel - kDecode, call);
        case 2: return run_sddmm<2>(call.kernel - kDecode, call);
        default: throw std::runtime_error("sp24_sddmm: no kernel for operands of type " + std::to_string(call.type));
    }
}

void repack(const RepackCall& call) {
    switch (call.type) {  // 16-bit types share their kernels, and so do 8-bit ones
        case 1:
        case 2: return run_repack<1>(call);
        case 3:
        case 4: return run_repack<3>(call);
        default: throw std::runtime_error("sp24_repack: no kernel for type " + std::to_string(call.type));
    }
}

}  // namespace sk::sp24
