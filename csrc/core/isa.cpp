#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sk {
namespace {

#if defined(__x86_64__)
struct Cpuid {
    unsigned eax, ebx, ecx, edx;
};

Cpuid cpuid(unsigned leaf, unsigned sub = 0) {
    Cpuid r{0, 0, 0, 0};
    __get_cpuid_count(leaf, sub, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

bool bit(unsigned word, int n) { return (word >> n) & 1u; }

unsigned long long xgetbv0() {
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (static_cast<unsigned long long>(hi) << 32) | lo;
}

// Linux hands out the 8 KB of tile state on request, once per process.
bool request_amx() {
#if defined(__linux__)
    constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
    return granted;
#else
    return false;
#endif
}

bool detect(Isa isa) {
    if (isa == Isa::portable) return true;
    const Cpuid l1 = cpuid(1), l7 = cpuid(7), l71 = cpuid(7, 1);
    if (!bit(l1.ecx, 27)) return false;  // OSXSAVE
    const unsigned long long xcr0 = xgetbv0();
    const bool os_avx = (xcr0 & 0x6) == 0x6, os_avx512 = (xcr0 & 0xe6) == 0xe6, os_amx = (xcr0 >> 17 & 3) == 3;
    const bool avx2 = os_avx && bit(l1.ecx, 12) && bit(l1.ecx, 29) && bit(l7.ebx, 5);  // FMA, F16C, AVX2
    const bool avx512 = avx2 && os_avx512 && bit(l7.ebx, 16) && bit(l7.ebx, 17) && bit(l7.ebx, 28) && bit(l7.ebx, 30) &&
                        bit(l7.ebx, 31);  // F DQ CD BW VL
    // VBMI, VBMI2, VNNI, VPOPCNTDQ, BF16
    const bool bf16 =
        avx512 && bit(l7.ecx, 1) && bit(l7.ecx, 6) && bit(l7.ecx, 11) && bit(l7.ecx, 14) && bit(l71.eax, 5);
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2: return avx2;
        case Isa::avx512: return avx512;
        case Isa::avx512_bf16: return bf16;
        case Isa::amx:  // TILE, BF16, INT8
            return bf16 && os_amx && bit(l7.edx, 24) && bit(l7.edx, 22) && bit(l7.edx, 25) && request_amx();
    }
    return false;
}
#else
bool detect(Isa isa) { return isa == Isa::portable; }
#endif

bool built(Isa isa) { return SK_BUILT_ISAS >> static_cast<int>(isa) & 1; }

Isa best() {
    Isa top = Isa::portable;
    for (int i = 0; i < kIsaCount; ++i)
        if (built(Isa(i)) && isa_supported(Isa(i))) top = Isa(i);
    if (const char* wanted = std::getenv("SPARSEKERN_ISA"))
        for (int i = 0; i <= static_cast<int>(top); ++i)
            if (!std::strcmp(wanted, kIsaNames[i]) && built(Isa(i))) return Isa(i);
    return top;
}

std::atomic<int>& current() {
    static std::atomic<int> isa{static_cast<int>(best())};
    return isa;
}

}  // namespace

bool isa_supported(Isa isa) {
    static const bool supported[kIsaCount] = {detect(Isa(0)), detect(Isa(1)), detect(Isa(2)), detect(Isa(3)),
                                              detect(Isa(4))};
    return supported[static_cast<int>(isa)];
}

Isa active_isa() { return Isa(current().load(std::memory_order_relaxed)); }

void set_active_isa(Isa isa) {
    if (!built(isa) || !isa_supported(isa))
        throw std::invalid_argument(std::string("instruction set ") + kIsaNames[static_cast<int>(isa)] +
                                    (built(isa) ? " is not supported by this processor" : " was not built"));
    current().store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace sk
