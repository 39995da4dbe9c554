// One kernel table per instruction set, and the choice between them at run time.
#pragma once
#include "isa.h"

#define SK_DECLARE_TABLES_1(isa, Type, name) \
    namespace isa {                          \
    extern const Type name;                  \
    }
// Declares sk::<isa>::name for every instruction set; use it inside namespace sk.
#define SK_DECLARE_TABLES(Type, name)            \
    SK_DECLARE_TABLES_1(portable, Type, name)    \
    SK_DECLARE_TABLES_1(avx2, Type, name)        \
    SK_DECLARE_TABLES_1(avx512, Type, name)      \
    SK_DECLARE_TABLES_1(avx512_bf16, Type, name) \
    SK_DECLARE_TABLES_1(amx, Type, name)

// The table of the active instruction set. Sets that were not built are not referred to, so that the module links.
#if SK_BUILT_ISAS & 2
#define SK_TABLE_avx2(name) \
    if (isa == ::sk::Isa::avx2) return ::sk::avx2::name;
#else
#define SK_TABLE_avx2(name)
#endif
#if SK_BUILT_ISAS & 4
#define SK_TABLE_avx512(name) \
    if (isa == ::sk::Isa::avx512) return ::sk::avx512::name;
#else
#define SK_TABLE_avx512(name)
#endif
#if SK_BUILT_ISAS & 8
#define SK_TABLE_avx512_bf16(name) \
    if (isa == ::sk::Isa::avx512_bf16) return ::sk::avx512_bf16::name;
#else
#define SK_TABLE_avx512_bf16(name)
#endif
#if SK_BUILT_ISAS & 16
#define SK_TABLE_amx(name) \
    if (isa == ::sk::Isa::amx) return ::sk::amx::name;
#else
#define SK_TABLE_amx(name)
#endif
#define SK_RETURN_ACTIVE_TABLE(name)          \
    const ::sk::Isa isa = ::sk::active_isa(); \
    SK_TABLE_amx(name) SK_TABLE_avx512_bf16(name) SK_TABLE_avx512(name) SK_TABLE_avx2(name) return ::sk::portable::name;
