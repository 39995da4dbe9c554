// The csr kernels' table for one instruction set, and the plan that the tiled ones walk.
#include "rows.h"

SK_ISA_BEGIN

void csr_mm(const CsrMm&);
void csr_mm_t(const CsrMmT&);
void csr_sddmm(const CsrSddmm&);
int64_t csr_count(const CsrPack&);
void csr_fill(const CsrPack&);
void csr_unpack(const CsrPack&);

// Segments are found by binary search (a tile's columns ascend and there are at most 2^shift of them), then put in
// order of their length by counting.
void csr_plan(const CsrMatrix& w, CsrSegment* out, int threads) {
    const Blocks b(w, out);
    if (w.crow[w.rows] < 1 << 20) threads = 1;
    parallel_for(b.blocks, threads, [&](int64_t block) {
        const int64_t rows = b.rows_of(block), size = int64_t(1) << b.shift;
        int32_t cursor[256];
        for (int64_t r = 0; r < rows; ++r) cursor[r] = w.crow[block * b.block + r];
        auto* places = static_cast<int32_t*>(scratch(4, size_t(size + 1) * 4));
        for (int64_t tile = 0; tile < b.tiles; ++tile) {
            const int64_t limit = (tile + 1) << b.shift;
            int32_t counts[256];
            std::fill(places, places + size + 1, 0);
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t* from = w.col + cursor[r];
                int64_t n = std::min<int64_t>(w.crow[block * b.block + r + 1] - cursor[r], size);
                const int32_t* base = from;
                while (n > 0) {  // to the first column at or beyond `limit`
                    const int64_t half = n / 2;
                    const bool below = base[half] < limit;
                    base = below ? base + half + 1 : base;
                    n = below ? n - half - 1 : half;
                }
                counts[r] = int32_t(base - from);
                ++places[counts[r]];
            }
            int32_t sum = 0;
            for (int64_t i = 0; i <= size; ++i) {
                const int32_t here = places[i];
                places[i] = sum;
                sum += here;
            }
            CsrSegment* group = out + (block * b.tiles + tile) * b.block;
            for (int64_t r = 0; r < rows; ++r) {
                group[places[counts[r]]++] = {uint32_t(cursor[r]), uint16_t(r), uint16_t(counts[r])};
                cursor[r] += counts[r];
            }
        }
    });
}

const CsrTable csr_table = {csr_plan, csr_mm, csr_mm_t, csr_sddmm, csr_count, csr_fill, csr_unpack};

SK_ISA_END
