// mm and mm_t on vector registers: every level, every type, every block shape.
//
// Tokens lie in the lanes: a chunk of tokens is packed into panels of 1..3 vectors, and each group of blocks is walked
// once a panel with its accumulators in registers. A panel is kept within the second-level cache.
#include "product.h"
#include "vector.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kPanelBytes = int64_t(3) << 19;  // most a panel may take: it is read once per group, from L2

// One panel of the activations: tokens m0.. of dwords k0 .. k0 + count (of panel_depth), zero beyond the matrix.
void pack_panel_part(const Product& p, int64_t m0, int tokens, int vectors, int64_t k0, int64_t count, char* panel) {
    const int nt = vectors * kLanes;
    char* out = panel + k0 * nt * 4;
    const int64_t e0 = k0 * p.per_dword, left = p.x.cols - e0;
    const int64_t elements = left < 0 ? 0 : left < count * p.per_dword ? left : count * p.per_dword;
    const char* x = p.x_row(m0) + (elements > 0 ? e0 : 0) * size_of(p.x.dtype);
    switch (p.mode) {
        case Mode::f32:
            dispatch_float(p.x.dtype, [&]<Dtype T>() {
                pack_panel<T>(x, p.x.ld, tokens, elements, nt, reinterpret_cast<float*>(out));
            });
            std::memset(out + elements * nt * 4, 0, size_t((count - elements) * nt * 4));
            return;
        case Mode::i16:
            for (int64_t k = 0; k < count; ++k) {
                uint32_t* row = reinterpret_cast<uint32_t*>(out) + k * nt;
                for (int t = 0; t < nt; ++t) {
                    const int8_t* in = reinterpret_cast<const int8_t*>(x) + t * p.x.ld;
                    uint32_t dword = 0;
                    for (int h = 0; h < p.per_dword; ++h)
                        if (t < tokens && k * p.per_dword + h < elements)
                            dword |= uint32_t(uint16_t(int16_t(in[k * p.per_dword + h]))) << 16 * h;
                    row[t] = dword;
                }
            }
            return;
        default:
#if SK_LEVEL >= SK_AVX512_BF16
            const int64_t size = size_of(p.x.dtype);
            for (int v = 0; v < vectors; ++v) {
                const int rows = tokens - v * kLanes;
                pack_dwords(out + v * 64, rows > 0 ? x + v * kLanes * p.x.ld * size : x, p.x.ld * size,
                            rows < 0        ? 0
                            : rows < kLanes ? rows
                                            : kLanes,
                            elements * size, count, kLanes, nt * 4);
            }
            if (p.mode == Mode::i8) {
                uint32_t* dwords = reinterpret_cast<uint32_t*>(out);
                for (int64_t i = 0; i < count * nt; ++i) dwords[i] ^= 0x80808080u;
            }
#endif
            return;
    }
}

// The panel holds x + 128: takes 128 * (sum of the weights of a row) off its sums.
void remove_offset(const Walk& w, int64_t r0, int64_t r1, int nt, int32_t* c) {
    for (int64_t r = r0; r < r1; ++r, c += nt) {
        int32_t sum = 0;
        for (int64_t j = 0; j < w.blocks; ++j) {
            const auto* values = reinterpret_cast<const int8_t*>(w.a + j * w.a_block + r * w.a_row);
            for (int64_t i = 0; i < w.depth * 4; ++i) sum += values[i];
        }
        for (int t = 0; t < nt; ++t) c[t] -= 128 * sum;
    }
}

constexpr int64_t kStrip = 32;  // output rows that meet all panels before the next ones

struct Panel {
    int64_t m0;
    int tokens, vectors;
    int64_t offset;  // bytes from the first panel
};

// 16 rows at a time meet all panels, so that their weights come from memory once and their outputs leave as whole
// cache lines. While they do, the rows after them are fetched.
void run_group(const Product& p, int64_t g, const Panel* panels, int64_t count, const char* packed) {
    Walk walk = walk_group(p, g, 1);
    const int64_t rows = p.outs(), n0 = g * rows;
    char* c = static_cast<char*>(scratch(2, size_t(kStrip * kVectorsMax) * sizeof(Vf)));
    for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
        const int64_t r1 = r0 + kStrip < rows ? r0 + kStrip : rows, left = p.total_outs() - n0 - r0;
        if (!p.transposed && in_place(p)) {
            walk.ahead = walk.a + r1 * walk.a_row + (r1 < rows ? 0 : walk.blocks * walk.a_block - rows * walk.a_row);
            walk.ahead_lines = ceil_div((r1 - r0) * walk.a_row, 64 * count * ceil_div(r1 - r0, kRowsMax));
        }
        for (int64_t i = 0; i < count; ++i) {
            const Panel& panel = panels[i];
            const int nt = panel.vectors * kLanes;
            pick_walk(p.mode, panel.vectors, p.transposed)(walk, r0, r1, packed + panel.offset, c);
            if (p.mode == Mode::i8) remove_offset(walk, r0, r1, nt, reinterpret_cast<int32_t*>(c));
            finish(p, reinterpret_cast<float*>(c), nt, panel.m0, panel.tokens, n0 + r0,
                   left < r1 - r0 ? left : r1 - r0);
        }
    }
}

}  // namespace

void product_vector(const Product& p) {
    constexpr int kMost = 64;  // panels in a chunk
    const int64_t depth = p.panel_depth(), vector_bytes = (depth ? depth : 1) * 4 * kLanes;
    int widest = int(kPanelBytes / vector_bytes);
    widest = widest < 1 ? 1 : widest > kVectorsMax ? kVectorsMax : widest;
    const int64_t vectors = ceil_div(p.tokens(), kLanes), total = ceil_div(vectors, widest);
    int64_t chunk = kPanelBytes / (vector_bytes * widest);
    chunk = chunk < 1 ? 1 : chunk > kMost ? kMost : chunk;
    for (int64_t first = 0; first < total; first += chunk) {
        const int64_t count = total - first < chunk ? total - first : chunk;
        Panel panels[kMost];
        int64_t bytes = 0;
        for (int64_t i = 0; i < count; ++i) {  // as even as whole vectors allow
            const int64_t v0 = vectors * (first + i) / total, v1 = vectors * (first + i + 1) / total;
            const int64_t m0 = v0 * kLanes, m1 = v1 * kLanes < p.tokens() ? v1 * kLanes : p.tokens();
            panels[i] = {m0, int(m1 - m0), int(v1 - v0), bytes};
            bytes += (v1 - v0) * vector_bytes;
        }
        char* packed = static_cast<char*>(scratch(0, size_t(bytes)));
        constexpr int64_t kPart = 512;  // dwords; a multiple of every vector width
        const int64_t parts = ceil_div(depth, kPart);
        parallel_for(count * parts, p.threads, [&](int64_t task) {
            const Panel& panel = panels[task / parts];
            const int64_t k0 = task % parts * kPart;
            pack_panel_part(p, panel.m0, panel.tokens, panel.vectors, k0, depth - k0 < kPart ? depth - k0 : kPart,
                            packed + panel.offset);
        });
        for_each_part(p, count, [&](int64_t g0, int64_t g1, int64_t p0, int64_t p1) {
            for (int64_t g = g0; g < g1; ++g) run_group(p, g, panels + p0, p1 - p0, packed);
        });
    }
}

SK_ISA_END
