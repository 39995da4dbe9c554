// What the sources of the bitmap kernels show each other, once per instruction set.
#pragma once
#include "host.h"

SK_ISA_BEGIN

// mm on tiles (amx only), see host_tiles.cpp; false where a value does not fit them.
bool bitmap_mm_tiles(const Bitmap& w, const Dense& x, const Dense& y, const Epilogue& e, int threads);

void bitmap_count(const Dense& w, uint8_t* bits, int64_t* offsets, int threads);
void bitmap_fill(const Dense& w, const uint8_t* bits, const int64_t* offsets, void* values, int threads);
void bitmap_unpack(const Bitmap& w, void* dense, int threads);
void bitmap_columns(const uint8_t* bits, const int64_t* offsets, int64_t n, int64_t k, int32_t* col, int threads);

SK_ISA_END
