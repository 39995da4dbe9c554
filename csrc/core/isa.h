// Which instruction set a translation unit is compiled for, and which ones the processor has.
//
// Every kernel source is compiled once per instruction set, with -DSK_ISA=<name> and the matching -m flags, into
// its own namespace sk::<name>. Code that an instruction set could change must live inside that namespace
// (SK_ISA_BEGIN ... SK_ISA_END): an inline function outside it would be merged by the linker across flags.
#pragma once

namespace sk {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
inline constexpr int kIsaCount = 5;
inline constexpr const char* kIsaNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

// The best set that this processor and this build have; SPARSEKERN_ISA=<name> lowers it (never raises it).
Isa active_isa();
// True where the processor and the operating system allow it, whether or not it was built.
bool isa_supported(Isa isa);
// Selects a lower (or again a higher) set at run time, for tests. Throws std::invalid_argument where unsupported.
void set_active_isa(Isa isa);

}  // namespace sk

#ifdef SK_ISA
#define SK_ISA_BEGIN \
    namespace sk {   \
    namespace SK_ISA {
#define SK_ISA_END \
    }              \
    }
#define SK_CAT_(a, b) a##b
#define SK_CAT(a, b) SK_CAT_(a, b)
#define SK_LEVEL_portable 0
#define SK_LEVEL_avx2 1
#define SK_LEVEL_avx512 2
#define SK_LEVEL_avx512_bf16 3
#define SK_LEVEL_amx 4
// Compare with these in #if: SK_LEVEL >= SK_AVX512 and so on. Each level contains the ones below it (on x86).
#define SK_LEVEL SK_CAT(SK_LEVEL_, SK_ISA)
#define SK_AVX2 1
#define SK_AVX512 2
#define SK_AVX512_BF16 3
#define SK_AMX 4
#endif
