// The list of sp24's kernels, and the call that finds its own in it.
#include "kernels.cuh"

namespace sk::sp24 {

std::vector<KernelInfo> kernels(int type) {
    std::vector<KernelInfo> all;
    list_mm_sm90(type, all);
    list_mm_sm80(type, all);
    list_decode(type, all);
    return all;
}

void mm(const MmCall& call) {
#define SK_COUNT(...) +1
    constexpr int kSm90 = 0 SK_SP24_MM_SM90(SK_COUNT), kSm80 = 0 SK_SP24_MM_SM80(SK_COUNT);
    if (call.kernel < kSm90) return run_mm_sm90(call.kernel, call);
    if (call.kernel < kSm90 + kSm80) return run_mm_sm80(call.kernel - kSm90, call);
    run_decode(call.kernel - kSm90 - kSm80, call);
}

}  // namespace sk::sp24
