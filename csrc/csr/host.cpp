// The csr kernels' table for one instruction set, and the plan that the tiled ones walk.
#include <cstring>

#include "rows.h"

SK_ISA_BEGIN

bool csr_mm(const CsrMm&);
void csr_mm_t(const CsrMmT&);
void csr_sddmm(const CsrSddmm&);
int64_t csr_count(const CsrPack&);
void csr_fill(const CsrPack&);
void csr_unpack(const CsrPack&);

namespace {

constexpr int64_t kSerialNonzeros = 1 << 18;

// out[j] = col[j] - first for j < count.
inline void narrow(const int32_t* col, int32_t first, int64_t count, uint8_t* out) {
#if SK_LEVEL >= SK_AVX512
    const __m512i base = _mm512_set1_epi32(first);
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 mask = __mmask16(count - j >= 16 ? 0xffff : (1u << (count - j)) - 1);
        const __m512i v = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, col + j), base);
        _mm512_mask_cvtepi32_storeu_epi8(out + j, mask, v);
    }
#else
    for (int64_t j = 0; j < count; ++j) out[j] = uint8_t(col[j] - first);
#endif
}

}  // namespace

// As wide a tile as its x, at the panel's width, leaves room for in L1.
int csr_tile(int64_t m, int64_t rows, int64_t cols, int64_t nnz) {
    if (m <= kLanes) return 0;
    const int64_t row = Panels(m, widest_panel(rows, cols, nnz)).width(0) * int64_t(sizeof(Vf));
    if (cols * row <= kL1Panel) return 0;
    return int(std::min<int64_t>(kMaxTile, kL1Panel / row));
}

// Segments are found by binary search (a row's columns ascend, and at most `tile` of them lie in one), then put in
// order of their length by counting.
void csr_plan(const CsrMatrix& w, void* out, int threads) {
    const Blocks b(w, out);
    if (w.crow[w.rows] < kSerialNonzeros) threads = 1;
    parallel_for(b.blocks, threads, [&](int64_t block) {
        const int64_t rows = b.rows_of(block), size = b.tile;
        const int32_t* crow = w.crow + block * b.block;
        int32_t cursor[kCsrMaxBlock], counts[kCsrMaxBlock], places[kMaxTile + 1];
        std::copy(crow, crow + rows, cursor);
        auto* begins = const_cast<uint32_t*>(b.begins) + block * b.tiles;
        auto* columns = const_cast<uint8_t*>(b.columns);
        int64_t position = crow[0];
        for (int64_t tile = 0; tile < b.tiles; ++tile) {
            const int64_t limit = (tile + 1) * b.tile;
            std::fill(places, places + size + 1, 0);
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t* from = w.col + cursor[r];
                const int32_t* at = from;
                int64_t n = std::min<int64_t>(crow[r + 1] - cursor[r], size);
                while (n > 0) {  // to the first column at or beyond `limit`
                    const int64_t half = n / 2;
                    const bool below = at[half] < limit;
                    at = below ? at + half + 1 : at;
                    n = below ? n - half - 1 : half;
                }
                counts[r] = int32_t(at - from);
                ++places[counts[r]];
            }
            int32_t sum = 0;
            for (int64_t i = 0; i <= size; ++i) {
                const int32_t here = places[i];
                places[i] = sum;
                sum += here;
            }
            auto* group = const_cast<CsrSegment*>(b.group(block, tile));
            for (int64_t r = 0; r < rows; ++r) {
                group[places[counts[r]]++] = {uint32_t(cursor[r]), uint16_t(r), uint16_t(counts[r])};
                cursor[r] += counts[r];
            }
            begins[tile] = uint32_t(position);
            for (int64_t i = 0; i < rows; ++i) {
                narrow(w.col + group[i].start, int32_t(tile * b.tile), group[i].count, columns + position);
                position += group[i].count;
            }
        }
    });
}

void csr_stream(const CsrMatrix& w, void* out, int threads) {
    const Blocks b(w, w.plan);
    if (w.crow[w.rows] < kSerialNonzeros) threads = 1;
    const int64_t size = size_of(w.dtype);
    auto* hashes = stream_hashes(w, out);
    parallel_for(b.blocks * b.tiles, threads, [&](int64_t task) {
        const int64_t block = task / b.tiles, tile = task % b.tiles;
        const CsrSegment* s = b.group(block, tile);
        char* to = static_cast<char*>(out) + b.begin(block, tile) * size;
        for (int64_t i = 0; i < b.rows_of(block); ++i) {
            const int64_t bytes = s[i].count * size;
            std::memcpy(to, static_cast<const char*>(w.values) + s[i].start * size, size_t(bytes));
            to += bytes;
        }
        hashes[task] = Watch(w, b, block, tile).finish();
    });
}

const CsrTable csr_table = {csr_tile,  csr_plan,  csr_stream, csr_mm,    csr_mm_t,
                            csr_sddmm, csr_count, csr_fill,   csr_unpack};

SK_ISA_END
