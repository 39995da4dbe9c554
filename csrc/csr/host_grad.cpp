// csr mm_t (dx = dy W) and sddmm (dW = dy^T x at the stored positions): the same walk over row blocks and column
// tiles as the tiled mm, with the same plan and values read, or written, in place.
#include "rows.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kPacked = int64_t(64) << 20;  // bytes of packed dy at a time
constexpr int kQueue = 64;                      // partial dot products that wait to be added up

// Packs columns [0, x.cols) of panels [p0, p1) one after another.
void pack_panels(const Dense& x, const Panels& panels, int64_t p0, int64_t p1, int threads, float* out) {
    constexpr int64_t kPiece = 512;
    const int64_t pieces = (x.cols + kPiece - 1) / kPiece;
    parallel_for((p1 - p0) * pieces, threads, [&](int64_t task) {
        const int64_t p = p0 + task / pieces, k0 = task % pieces * kPiece;
        const int nt = panels.width(p) * kLanes;
        float* panel = out + (panels.token(p) - panels.token(p0)) * x.cols;
        pack(x, panels.token(p), panels.used(p), k0, std::min(kPiece, x.cols - k0), nt, panel + k0 * nt);
    });
}

// tile[col] += value * dy[row] for every nonzero of a group.
template <int NV, Dtype T>
void scatter_group(const CsrMatrix& w, const CsrSegment* s, int64_t rows, const uint8_t* col, const float* dy,
                   float* tile) {
    constexpr int64_t kWidth = NV * kLanes, kAhead = 4;
    alignas(64) float buffer[T == Dtype::f32 ? 1 : kMaxTile + kLanes];
    for (int64_t i = 0; i < rows; ++i) {
        const CsrSegment& later = s[std::min(i + kAhead, rows - 1)];
        prefetch(dy + later.row * kWidth, kWidth * 4);
        prefetch(static_cast<const char*>(w.values) + later.start * size_of(T), later.count * size_of(T));
        const int64_t count = s[i].count;
        const float* value = floats<T>(w.values, s[i].start, count, buffer);
        const float* row = dy + s[i].row * kWidth;
        Vf d[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) d[v] = vf_load(row + v * kLanes);
        for (int64_t j = 0; j < count; ++j) {
            float* out = tile + col[j] * kWidth;
            const Vf f = vf_set(value[j]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) vf_store(out + v * kLanes, vf_load(out + v * kLanes) + f * d[v]);
        }
        col += count;
    }
}

// The dot products of one group, over the tokens of one panel: out[position] = or += sum_t dy[row][t] x[col][t].
// The partial sums of many nonzeros are queued as vectors, so that adding up their lanes is done kLanes at a time
// whatever the lengths of the segments.
template <int NV>
void dot_group(const CsrSegment* s, int64_t rows, const uint8_t* col, const float* dy, const float* x, float* out,
               bool first) {
    constexpr int64_t kWidth = NV * kLanes, kAhead = 4;
    alignas(64) Vf queue[kQueue];
    struct Run {
        uint32_t start, count;
    } runs[kQueue];
    int queued = 0, count_runs = 0;
    const auto flush = [&] {
        alignas(64) float sums[kQueue + kLanes];
        for (int q = queued; q % kLanes; ++q) queue[q] = Vf{};
        for (int q = 0; q < queued; q += kLanes) {
            Vf r[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) r[i] = queue[q + i];
            vf_store(sums + q, sum_rows(r));
        }
        const float* sum = sums;
        for (int r = 0; r < count_runs; ++r) {
            float* to = out + runs[r].start;
            for (int64_t j = 0; j < runs[r].count; j += kLanes) {
                const int n = int(runs[r].count - j);
                Vf v = vf_load_part<Dtype::f32>(sum + j, n);
                if (!first) v += vf_load_part<Dtype::f32>(to + j, n);
                vf_store_part<Dtype::f32>(to + j, v, n);
            }
            sum += runs[r].count;
        }
        queued = count_runs = 0;
    };
    for (int64_t i = 0; i < rows; ++i) {
        const CsrSegment& later = s[std::min(i + kAhead, rows - 1)];
        prefetch(dy + later.row * kWidth, kWidth * 4);
        prefetch(out + later.start, later.count * 4);
        const float* row = dy + s[i].row * kWidth;
        Vf d[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) d[v] = vf_load(row + v * kLanes);
        int64_t start = s[i].start, left = s[i].count;
        while (left > 0) {
            if (queued == kQueue) flush();
            const int n = int(std::min<int64_t>(left, kQueue - queued));
            for (int j = 0; j < n; ++j) {
                const float* in = x + col[j] * kWidth;
                // Two chains: a single one would be NV multiply-adds long.
                Vf a = d[0] * vf_load(in), b = {};
                if constexpr (NV > 1) b = d[1] * vf_load(in + kLanes);
#pragma GCC unroll 8
                for (int v = 2; v < NV; ++v) (v & 1 ? b : a) += d[v] * vf_load(in + v * kLanes);
                queue[queued + j] = a + b;
            }
            runs[count_runs++] = {uint32_t(start), uint32_t(n)};
            queued += n, start += n, left -= n, col += n;
        }
    }
    if (queued) flush();
}

}  // namespace

void csr_mm_t(const CsrMmT& given) {
    CsrMmT a = given;
    CsrMatrix& w = a.w;
    if (a.dy.rows == 0 || w.cols == 0) return;
    if (int64_t(w.crow[w.rows]) * a.dy.rows < kSerialWork) a.threads = 1;
    const void* plan = plan_of(w, a.dy.rows, a.threads);
    const Blocks blocks(w, plan);
    const Panels panels(a.dy.rows, widest_panel(w));
    const int64_t widest = kMaxVectors * kLanes;
    const int64_t chunk = std::max<int64_t>(1, kPacked / (std::max<int64_t>(w.rows, 1) * widest * 4));
    for (int64_t p0 = 0; p0 < panels.count; p0 += chunk) {
        const int64_t p1 = std::min(panels.count, p0 + chunk), origin = panels.token(p0);
        float* dy = static_cast<float*>(
            scratch(0, size_t((panels.first_vector(p1) - panels.first_vector(p0)) * kLanes * w.rows * 4)));
        pack_panels(a.dy, panels, p0, p1, a.threads, dy);
        // A task owns one tile of dx, so nobody else adds to it and the order of additions is fixed.
        parallel_for((p1 - p0) * blocks.tiles, a.threads, [&](int64_t task) {
            const int64_t p = p0 + task / blocks.tiles, tile = task % blocks.tiles, k0 = blocks.tile_begin(tile);
            const int64_t size = blocks.tile_size(tile);
            const int nt = panels.width(p) * kLanes;
            const float* panel = dy + (panels.token(p) - origin) * w.rows;
            float* dx = static_cast<float*>(scratch(1, size_t(nt) * blocks.tile * 4));
            std::fill(dx, dx + size * nt, 0.0f);
            dispatch_values(w.dtype, [&]<Dtype T>() {
                dispatch_width(panels.width(p), [&]<int NV>() {
                    for (int64_t b = 0; b < blocks.blocks; ++b)
                        scatter_group<NV, T>(w, blocks.group(b, tile), blocks.rows_of(b),
                                             blocks.columns + blocks.begin(b, tile), panel + b * blocks.block * nt, dx);
                });
            });
            dispatch_float(a.dx.dtype, [&]<Dtype T>() {
                char* to = static_cast<char*>(a.dx.data) + (panels.token(p) * a.dx.ld + k0) * size_of(T);
                unpack_panel<T>(dx, nt, panels.used(p), size, Epilogue{nullptr, nullptr, Dtype::f32, Act::none}, to,
                                a.dx.ld);
            });
        });
    }
}

void csr_sddmm(const CsrSddmm& given) {
    CsrSddmm a = given;
    CsrMatrix& w = a.w;
    const int64_t nnz = w.crow[w.rows];
    char* values = static_cast<char*>(const_cast<void*>(w.values));
    if (nnz == 0) return;
    if (a.x.rows == 0) return std::fill(values, values + nnz * size_of(w.dtype), char(0));
    if (nnz * a.x.rows < kSerialWork) a.threads = 1;
    const void* plan = plan_of(w, a.x.rows, a.threads);
    const Blocks blocks(w, plan);
    const Panels panels(a.x.rows, widest_panel(w));
    // Partial sums over the panels are kept in float: in place, or beside a narrower output.
    float* out =
        w.dtype == Dtype::f32 ? reinterpret_cast<float*>(values) : static_cast<float*>(scratch(4, size_t(nnz) * 4));
    const int64_t widest = kMaxVectors * kLanes;
    const int64_t chunk = std::max<int64_t>(1, kPacked / ((w.rows + w.cols) * widest * 4));
    const int64_t ranges = a.threads > 1 ? std::min<int64_t>(blocks.blocks, 4 * a.threads) : 1;
    for (int64_t p0 = 0; p0 < panels.count; p0 += chunk) {
        const int64_t p1 = std::min(panels.count, p0 + chunk), origin = panels.token(p0);
        const int64_t packed = (panels.first_vector(p1) - panels.first_vector(p0)) * kLanes;
        float* dy = static_cast<float*>(scratch(0, size_t(packed * w.rows * 4)));
        float* x = static_cast<float*>(scratch(1, size_t(packed * w.cols * 4)));
        pack_panels(a.dy, panels, p0, p1, a.threads, dy);
        pack_panels(a.x, panels, p0, p1, a.threads, x);
        parallel_for(ranges, a.threads, [&](int64_t r) {
            const int64_t n0 = split_rows(w, blocks.block, ranges, r), n1 = split_rows(w, blocks.block, ranges, r + 1);
            for (int64_t p = p0; p < p1; ++p) {
                const int nt = panels.width(p) * kLanes;
                const float* dyp = dy + (panels.token(p) - origin) * w.rows;
                const float* xp = x + (panels.token(p) - origin) * w.cols;
                dispatch_width(panels.width(p), [&]<int NV>() {
                    for (int64_t tile = 0; tile < blocks.tiles; ++tile)
                        for (int64_t b = n0 / blocks.block; b * blocks.block < n1; ++b)
                            dot_group<NV>(blocks.group(b, tile), blocks.rows_of(b),
                                          blocks.columns + blocks.begin(b, tile), dyp + b * blocks.block * nt,
                                          xp + blocks.tile_begin(tile) * nt, out, p == 0);
                });
            }
        });
    }
    if (w.dtype == Dtype::f32) return;
    dispatch_float(w.dtype, [&]<Dtype T>() {
        constexpr int64_t kPiece = 1 << 16;
        parallel_for((nnz + kPiece - 1) / kPiece, a.threads, [&](int64_t task) {
            const int64_t end = std::min(nnz, (task + 1) * kPiece);
            for (int64_t j = task * kPiece; j < end; j += kLanes) {
                const int n = int(std::min<int64_t>(kLanes, end - j));
                vf_store_part<T>(values + j * size_of(T), vf_load_part<Dtype::f32>(out + j, n), n);
            }
        });
    });
}

SK_ISA_END
