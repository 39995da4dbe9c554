// The table of the bsr kernels of one instruction set (see core/isa.h).
#include "host.h"

SK_ISA_BEGIN

void bsr_mm(const BsrMm&);
void bsr_mm_t(const BsrMmT&);
void bsr_sddmm(const BsrSddmm&);
void bsr_count(const BsrPack&);
void bsr_fill(const BsrPack&);
void bsr_unpack(const BsrPack&);
void bsr_transpose_index(const BsrTransposeIndex&);

extern const BsrTable bsr_table;
const BsrTable bsr_table = {bsr_mm, bsr_mm_t, bsr_sddmm, bsr_count, bsr_fill, bsr_unpack, bsr_transpose_index};

SK_ISA_END
