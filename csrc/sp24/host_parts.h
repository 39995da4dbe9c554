// What the sources of the sp24 kernels show each other, once per instruction set.
#pragma once
#include "host.h"

SK_ISA_BEGIN

// mm for many tokens, see host_panel.cpp.
void sp24_mm_panels(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads);
// mm on tiles (amx only), see host_tiles.cpp; false where a value does not fit them.
bool sp24_mm_tiles(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads);

int64_t sp24_pack(const Dense& w, void* values, uint8_t* meta, int threads);
void sp24_pack_top2(const Dense& w, void* values, uint8_t* meta, int threads);
void sp24_unpack(const Sp24& w, void* dense, int threads);
void sp24_columns(const uint8_t* meta, int64_t n, int64_t k, int32_t* col, int threads);
int64_t sp24_check(const uint8_t* meta, int64_t bytes);

SK_ISA_END
