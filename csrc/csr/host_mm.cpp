// csr mm: y = act(x W^T * scale + bias).
//
// Three ways, by the number of tokens:
// - a few: every row of W gathers from the rows of x ("gather");
// - up to one vector, or x small enough for L1: every row of W streams over a whole packed panel of x ("stream");
// - more: row blocks x column tiles, so that the tile of the x panel stays in L1 and the accumulators in L2 ("tiled").
#include <atomic>
#include <type_traits>

#include "rows.h"

SK_ISA_BEGIN
namespace {

constexpr int kGatherTokens = 2;
constexpr int64_t kAccumulators = 1 << 20;      // bytes of accumulators that one task keeps in L2
constexpr int64_t kPacked = int64_t(64) << 20;  // bytes of packed x at a time

// acc[v] += sum_j value[j] * x[col[j]][v]. Long rows under narrow panels want several sets of accumulators, because
// one multiply-add takes four cycles and two can start in each.
template <int NV, int Sets, class Column>
inline void accumulate(Vf (&acc)[NV], const float* value, const Column* col, int64_t count, const float* x) {
    const auto step = [&](Vf(&a)[NV], int64_t j) {
        const float* row = x + size_t(std::make_unsigned_t<Column>(col[j])) * (NV * kLanes);
        const Vf s = vf_set(value[j]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) a[v] += s * vf_load(row + v * kLanes);
    };
    if constexpr (Sets == 1) {
        int64_t j = 0;
        for (; j + 2 <= count; j += 2) step(acc, j), step(acc, j + 1);
        if (j < count) step(acc, j);
    } else {
        Vf more[Sets - 1][NV] = {};
        int64_t j = 0;
        for (; j + Sets <= count; j += Sets) {
            step(acc, j);
#pragma GCC unroll 8
            for (int s = 1; s < Sets; ++s) step(more[s - 1], j + s);
        }
        for (; j < count; ++j) step(acc, j);
#pragma GCC unroll 8
        for (int s = 1; s < Sets; ++s)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[v] += more[s - 1][v];
    }
}

// One row block times one column tile: c[row] (+)= its segment times the tile x. The values come one segment behind
// the other from `stream`, or from their places in w.values where that is null. `watch`, where given, reads along.
template <int NV, Dtype T, bool Watching>
void tile_group(const CsrMatrix& w, const CsrSegment* s, int64_t rows, const float* stream, const uint8_t* col,
                const float* x, float* c, bool first, Watch& watched) {
    constexpr int64_t kWidth = NV * kLanes, kAhead = 4;
    alignas(64) float buffer[T == Dtype::f32 ? 1 : kMaxTile + kLanes];
    Watch watch = watched;  // in registers
    int64_t i = 0;
    while (!first && i < rows && s[i].count == 0) ++i;
    for (; i < rows; ++i) {
        const CsrSegment& later = s[std::min(i + kAhead, rows - 1)];
        prefetch(c + later.row * kWidth, kWidth * 4);
        if constexpr (Watching) watch.step();
        const int64_t count = s[i].count;
        const float* value = stream;
        if (stream) {
            stream += count;
        } else {
            prefetch(static_cast<const char*>(w.values) + later.start * size_of(T), later.count * size_of(T));
            value = floats<T>(w.values, s[i].start, count, buffer);
        }
        float* out = c + s[i].row * kWidth;
        Vf acc[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[v] = first ? Vf{} : vf_load(out + v * kLanes);
        accumulate<NV, NV >= 4 ? 1 : 2>(acc, value, col, count, x);
        col += count;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) vf_store(out + v * kLanes, acc[v]);
    }
    watched = watch;
}

// The stream of one group as floats: in place, converted into scratch memory, or null where there is none.
template <Dtype T>
const float* group_stream(const CsrMatrix& w, const Blocks& blocks, int64_t b, int64_t tile) {
    if (!w.stream) return nullptr;
    const int64_t begin = blocks.begin(b, tile);
    if constexpr (T == Dtype::f32) return static_cast<const float*>(w.stream) + begin;
    const CsrSegment* s = blocks.group(b, tile);
    int64_t count = 0;
    for (int64_t i = 0; i < blocks.rows_of(b); ++i) count += s[i].count;
    float* buffer = static_cast<float*>(scratch(5, size_t(count + kLanes) * 4));
    return floats<T>(w.stream, begin, count, buffer);
}

// y[token .. token + used)[n0 .. n0 + count) from accumulators.
void unpack(const CsrMm& a, const float* c, int width, int64_t token, int used, int64_t n0, int64_t count) {
    dispatch_float(a.y.dtype, [&]<Dtype T>() {
        char* to = static_cast<char*>(a.y.data) + (token * a.y.ld + n0) * size_of(T);
        unpack_panel<T>(c, width, used, count, epilogue_from(a.epilogue, n0), to, a.y.ld);
    });
}

// Whether w.stream, where there is one, belongs to w.values; y is undefined where it does not.
bool tiled(CsrMm& a) {
    CsrMatrix& w = a.w;
    std::atomic<bool> fresh{true};
    const void* plan = plan_of(w, a.x.rows, a.threads);
    const Blocks blocks(w, plan);
    const Panels panels(a.x.rows, widest_panel(w));
    const int64_t width = panels.width(0) * kLanes;  // of the widest
    const int64_t fit = (w.rows * (width + kLanes) * 4 + kAccumulators - 1) / kAccumulators;
    const int64_t wanted = a.threads > 1 ? (2 * a.threads + panels.count - 1) / panels.count : 1;
    const int64_t ranges = std::min(blocks.blocks, std::max(fit, wanted));
    const int64_t chunk = std::max<int64_t>(1, kPacked / (w.cols * (width + kLanes) * 4));
    for (int64_t p0 = 0; p0 < panels.count; p0 += chunk) {
        const int64_t p1 = std::min(panels.count, p0 + chunk), origin = panels.first_vector(p0);
        // Several ranges share one packed x; a single range packs each tile when it comes to it, in L1.
        float* packed = nullptr;
        const auto at = [&](int64_t p) { return packed + (panels.first_vector(p) - origin) * kLanes * w.cols; };
        if (ranges > 1) {
            packed = static_cast<float*>(scratch(0, size_t((panels.first_vector(p1) - origin) * kLanes * w.cols * 4)));
            parallel_for((p1 - p0) * blocks.tiles, a.threads, [&](int64_t task) {
                const int64_t p = p0 + task / blocks.tiles, tile = task % blocks.tiles, k0 = blocks.tile_begin(tile);
                const int nt = panels.width(p) * kLanes;
                pack(a.x, panels.token(p), panels.used(p), k0, blocks.tile_size(tile), nt, at(p) + k0 * nt);
            });
        }
        parallel_for((p1 - p0) * ranges, a.threads, [&](int64_t task) {
            const int64_t p = p0 + task / ranges, r = task % ranges;
            const int64_t n0 = split_rows(w, blocks.block, ranges, r), n1 = split_rows(w, blocks.block, ranges, r + 1);
            if (n0 == n1) return;
            const int nt = panels.width(p) * kLanes;
            float* c = static_cast<float*>(scratch(1, size_t((n1 - n0) * nt * 4)));
            for (int64_t tile = 0; tile < blocks.tiles; ++tile) {
                const int64_t k0 = blocks.tile_begin(tile);
                const float* x = packed ? at(p) + k0 * nt : nullptr;
                if (!packed) {
                    float* here = static_cast<float*>(scratch(2, size_t(nt) * blocks.tile * 4));
                    pack(a.x, panels.token(p), panels.used(p), k0, blocks.tile_size(tile), nt, here);
                    x = here;
                }
                dispatch_values(w.dtype, [&]<Dtype T>() {
                    dispatch_width(panels.width(p), [&]<int NV>() {
                        for (int64_t b = n0 / blocks.block; b * blocks.block < n1; ++b) {
                            float* cb = c + (b * blocks.block - n0) * nt;
                            Watch watch(w, blocks, b, tile);
                            const bool watched = w.stream && p == 0;
                            (watched ? tile_group<NV, T, true>
                                     : tile_group<NV, T, false>)(w, blocks.group(b, tile), blocks.rows_of(b),
                                                                 group_stream<T>(w, blocks, b, tile),
                                                                 blocks.columns + blocks.begin(b, tile), x, cb,
                                                                 tile == 0, watch);
                            if (watched && watch.finish() != stream_hashes(w, w.stream)[b * blocks.tiles + tile])
                                fresh.store(false, std::memory_order_relaxed);
                            if (tile + 1 == blocks.tiles)
                                unpack(a, cb, nt, panels.token(p), panels.used(p), b * blocks.block, blocks.rows_of(b));
                        }
                    });
                });
            }
        });
    }
    return fresh;
}

void stream(const CsrMm& a) {
    constexpr int64_t kRows = 64, kPiece = 512;  // rows of accumulators at a time; values converted at a time
    const CsrMatrix& w = a.w;
    const Panels panels(a.x.rows, kMaxVectors);
    const int64_t parts = a.threads > 1 ? std::min<int64_t>(4 * a.threads, (w.rows + kRows - 1) / kRows) : 1;
    for (int64_t p = 0; p < panels.count; ++p) {
        const int nt = panels.width(p) * kLanes;
        float* x = static_cast<float*>(scratch(0, size_t(w.cols * nt * 4)));
        pack(a.x, panels.token(p), panels.used(p), 0, w.cols, nt, x);
        parallel_for(parts, a.threads, [&](int64_t part) {
            const int64_t n0 = split_rows(w, kRows, parts, part), n1 = split_rows(w, kRows, parts, part + 1);
            float* c = static_cast<float*>(scratch(1, size_t(kRows * nt * 4)));
            dispatch_values(w.dtype, [&]<Dtype T>() {
                dispatch_width(panels.width(p), [&]<int NV>() {
                    alignas(64) float buffer[T == Dtype::f32 ? 1 : kPiece + kLanes];
                    for (int64_t n = n0; n < n1; ++n) {
                        Vf acc[NV] = {};
                        const int64_t end = w.crow[n + 1], step = T == Dtype::f32 ? int64_t(1) << 31 : kPiece;
                        for (int64_t j = w.crow[n]; j < end; j += step) {
                            const int64_t count = std::min(step, end - j);
                            const float* values = floats<T>(w.values, j, count, buffer);
                            accumulate<NV, NV <= 4 ? 8 / NV : 1>(acc, values, w.col + j, count, x);
                        }
                        float* out = c + (n - n0) % kRows * nt;
                        for (int v = 0; v < NV; ++v) vf_store(out + v * kLanes, acc[v]);
                        if ((n - n0) % kRows == kRows - 1 || n + 1 == n1) {
                            const int64_t done = (n - n0) % kRows + 1;
                            unpack(a, c, nt, panels.token(p), panels.used(p), n + 1 - done, done);
                        }
                    }
                });
            });
        });
    }
}

// sum over j of values[j] * x[t][col[j]] lane by lane, `count` <= kLanes of them.
template <Dtype T, int MT>
inline void gather_step(Vf (&acc)[MT], const char* value, const int32_t* col, int count, const float* x, int64_t ldx) {
    const Vf s = vf_load_part<T>(value, count);
#if SK_LEVEL >= SK_AVX512
    const __mmask16 mask = __mmask16(count >= 16 ? 0xffff : (1u << count) - 1);
    const __m512i index = _mm512_maskz_loadu_epi32(mask, col);
#pragma GCC unroll 4
    for (int t = 0; t < MT; ++t) {
        // The full gather where it can be: the masked one keeps a false dependence on its source.
        const Vf g = (Vf)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, x + t * ldx, 4);
        acc[t] += s * g;
    }
#else
    for (int t = 0; t < MT; ++t) {
        Vf g = {};
        if (count >= kLanes) {
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; ++i) g[i] = x[t * ldx + col[i]];
        } else {
            for (int i = 0; i < count; ++i) g[i] = x[t * ldx + col[i]];
        }
        acc[t] += s * g;
    }
#endif
}

template <int MT>
void gather(const CsrMm& a) {
    constexpr int64_t kRows = 64;
    const CsrMatrix& w = a.w;
    const float* x = static_cast<const float*>(a.x.data);
    int64_t ldx = a.x.ld;
    if (a.x.dtype != Dtype::f32) {
        float* copy = static_cast<float*>(scratch(0, size_t((w.cols + kLanes) * MT * 4)));
        dispatch_float(a.x.dtype, [&]<Dtype T>() {
            for (int t = 0; t < MT; ++t) floats<T>(a.x.data, t * a.x.ld, w.cols, copy + t * (w.cols + kLanes));
        });
        x = copy, ldx = w.cols + kLanes;
    }
    const int64_t parts = a.threads > 1 ? std::min<int64_t>(4 * a.threads, (w.rows + kRows - 1) / kRows) : 1;
    parallel_for(parts, a.threads, [&](int64_t part) {
        const int64_t begin = split_rows(w, kRows, parts, part), end = split_rows(w, kRows, parts, part + 1);
        for (int64_t n0 = begin; n0 < end; n0 += kLanes) {
            const int rows = int(std::min<int64_t>(kLanes, end - n0));
            Vf sums[MT][kLanes];
            dispatch_values(w.dtype, [&]<Dtype T>() {
                const char* values = static_cast<const char*>(w.values);
                for (int i = 0; i < rows; ++i) {
                    constexpr int kSets = 4 / MT;
                    Vf acc[kSets][MT] = {};
                    int64_t j = w.crow[n0 + i];
                    const int64_t stop = w.crow[n0 + i + 1];
                    for (; j + kSets * kLanes <= stop; j += kSets * kLanes)
#pragma GCC unroll 4
                        for (int s = 0; s < kSets; ++s)
                            gather_step<T>(acc[s], values + (j + s * kLanes) * size_of(T), w.col + j + s * kLanes,
                                           kLanes, x, ldx);
                    for (; j < stop; j += kLanes)
                        gather_step<T>(acc[0], values + j * size_of(T), w.col + j,
                                       int(std::min<int64_t>(kLanes, stop - j)), x, ldx);
                    for (int t = 0; t < MT; ++t) {
                        Vf sum = acc[0][t];
                        for (int s = 1; s < kSets; ++s) sum += acc[s][t];
                        sums[t][i] = sum;
                    }
                }
            });
            const Epilogue e = epilogue_from(a.epilogue, n0);
            for (int t = 0; t < MT; ++t) {
                for (int i = rows; i < kLanes; ++i) sums[t][i] = Vf{};
                Vf y = sum_rows(sums[t]);
                if (e.scale) y *= vf_load_part<Dtype::f32>(e.scale, rows);
                if (e.bias) y += vf_load_bias(e.bias, e.bias_dtype, 0, rows);
                y = vf_act(e.act, y);
                dispatch_float(a.y.dtype, [&]<Dtype T>() {
                    vf_store_part<T>(static_cast<char*>(a.y.data) + (t * a.y.ld + n0) * size_of(T), y, rows);
                });
            }
        }
    });
}

}  // namespace

bool csr_mm(const CsrMm& given) {
    CsrMm a = given;
    const int64_t m = a.x.rows, nnz = a.w.crow[a.w.rows];
    if (m == 0 || a.w.rows == 0) return true;
    if (nnz * m < kSerialWork) a.threads = 1;
    if (m == 1) return gather<1>(a), true;
    if (m == 2) return gather<2>(a), true;
    if (csr_tile(m, a.w.rows, a.w.cols, nnz) == 0) return stream(a), true;
    if (tiled(a)) return true;
    a.w.stream = nullptr;
    tiled(a);
    return false;
}

SK_ISA_END
