// sp24 with many tokens, in float math: one kept weight meets a panel of tokens that lie side by side.
//
// X is packed once into panels [k][NT]. A tile of a panel, kTile k deep, stays in the first cache while a block of
// rows passes over it; the accumulators of the block live in the second. The regular structure spares the index
// stream of csr: two weights a group, their places in four bits. The bound is the first cache: one vector load for
// every vector of multiply-adds.
#include "../core/decode.h"
#include "../core/panel.h"
#include "../core/parallel.h"
#include "host.h"
#include "host_parts.h"

SK_ISA_BEGIN
namespace {

constexpr int64_t kTileBytes = SK_LEVEL >= SK_AVX512 ? 32 << 10 : 16 << 10;
constexpr int64_t kBlockRows = 256;

// V vectors of tokens; kTile k.
template <int V>
struct Panel {
    static constexpr int kTokens = V * kLanes;
    static constexpr int64_t kTile = kTileBytes / (kTokens * 4);
};

// acc += W[row, tile] X[tile, panel]: `bytes` of metadata, four values each, x at the first k of the tile.
template <int V>
inline void row_tile(const float* values, const uint8_t* meta, int64_t bytes, const float* x, Vf (&acc)[V]) {
    constexpr uint64_t kRow = Panel<V>::kTokens;  // floats between one k and the next
    constexpr bool kTwo = V < 8;  // too few accumulators to hide the latency: one set for each of a pair
    Vf other[V];
    if constexpr (kTwo)
        for (int i = 0; i < V; ++i) other[i] = Vf{};
    auto group = [&](uint64_t nibble, const float* v, const float* from) {
        const float* x0 = from + (nibble & 3) * kRow;
        const float* x1 = from + (nibble >> 2 & 3) * kRow;
        const Vf v0 = vf_set(v[0]), v1 = vf_set(v[1]);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) acc[i] += v0 * vf_load(x0 + i * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) (kTwo ? other[i] : acc[i]) += v1 * vf_load(x1 + i * kLanes);
    };
    int64_t b = 0;
    for (; b + 8 <= bytes; b += 8) {
        uint64_t word;
        __builtin_memcpy(&word, meta + b, 8);
#pragma GCC unroll 16
        for (int g = 0; g < 16; ++g) group(word >> 4 * g, values + b * 4 + 2 * g, x + (b * 8 + 4 * g) * kRow);
    }
    for (; b < bytes; ++b) {
        group(meta[b], values + b * 4, x + b * 8 * kRow);
        group(meta[b] >> 4, values + b * 4 + 2, x + (b * 8 + 4) * kRow);
    }
    if constexpr (kTwo)
        for (int i = 0; i < V; ++i) acc[i] += other[i];
}

// Sums of int8 products stay exact in float inside a tile; between tiles they are kept as integers.
template <int V, bool Exact>
inline void load_sums(const float* c, bool first, Vf (&acc)[V]) {
    for (int i = 0; i < V; ++i) acc[i] = first || Exact ? Vf{} : vf_load(c + i * kLanes);
}
template <int V, bool Exact>
inline void store_sums(float* c, bool first, bool last, const Vf (&acc)[V]) {
    for (int i = 0; i < V; ++i) {
        if constexpr (Exact) {
            Vi sum{};
            if (!first) __builtin_memcpy(&sum, c + i * kLanes, sizeof sum);
            sum += __builtin_convertvector(acc[i], Vi);
            const Vf out = last ? __builtin_convertvector(sum, Vf) : (Vf)sum;
            vf_store(c + i * kLanes, out);
        } else {
            vf_store(c + i * kLanes, acc[i]);
        }
    }
}

// A strip: kStrip k of a block of rows, copied to floats tile by tile and row by row. The copy reads every row in long
// runs and is then walked sequentially; the rows themselves lie a power of two apart more often than not, and their
// pieces would push each other out of the caches.
constexpr int64_t kStrip = 256;

template <Dtype T, int V>
struct Strip {
    static constexpr int64_t kTile = Panel<V>::kTile;
    alignas(64) float values[kBlockRows * kStrip / 2];
    alignas(64) uint8_t meta[kBlockRows * kStrip / 8];

    void fill(const Sp24& w, int64_t row, int64_t rows, int64_t at, int64_t bytes) {
        const int64_t metas = w.groups() / 2;
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* m = w.meta + (row + r) * metas + at;
            const char* v = static_cast<const char*>(w.values) + ((row + r) * metas + at) * 4 * size_of(T);
            for (int64_t t = 0; t < bytes; t += kTile / 8) {
                const int64_t some = least(kTile / 8, bytes - t);
                __builtin_memcpy(meta + t * rows + r * some, m + t, size_t(some));
                float* to = values + (t * rows + r * some) * 4;
                const char* from = v + t * 4 * size_of(T);
                int64_t i = 0;
                for (; i + kLanes <= some * 4; i += kLanes) vf_store(to + i, vf_load_as<T>(from + i * size_of(T)));
                for (; i < some * 4; ++i) to[i] = load_as<T>(from, i);
            }
        }
    }
};

// c[rows, panel] += W[row.., strip] X[strip, panel]; x at the first k of the strip, which is `bytes` of metadata long.
// Meanwhile the caches are asked for what comes next: the next tile of X, and the piece of the next strip of W at
// `next_values` and `next_meta` (rows `metas` apart).
template <Dtype T, int V, bool Exact>
void strip_mm(const Strip<T, V>& strip, int64_t rows, int64_t bytes, bool first, bool last, const float* x, float* c,
              const char* next_values, const uint8_t* next_meta, int64_t metas) {
    constexpr int64_t kTile = Panel<V>::kTile, kTokens = Panel<V>::kTokens, kSize = size_of(T);
    for (int64_t t = 0; t < bytes; t += kTile / 8) {
        const int64_t some = least(kTile / 8, bytes - t);
        const float* tile = x + t * 8 * kTokens;
        const float* values = strip.values + t * rows * 4;
        const uint8_t* meta = strip.meta + t * rows;
        const int64_t share = (kTileBytes / rows + 63) / 64 * 64;
        const char* next = reinterpret_cast<const char*>(tile) + kTileBytes;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < share; i += 64) prefetch(next + r * share + i);
            if (next_values) {
                const char* at = next_values + (r * metas + t) * 4 * kSize;
                for (int64_t i = 0; i < kTile / 2 * kSize; i += 64) prefetch(at + i);
                if (t == 0) prefetch(next_meta + r * metas);
            }
            Vf acc[V];
            load_sums<V, Exact>(c + r * kTokens, first && t == 0, acc);
            row_tile<V>(values + r * some * 4, meta + r * some, some, tile, acc);
            store_sums<V, Exact>(c + r * kTokens, first && t == 0, last && t + some == bytes, acc);
        }
    }
}

// Panels of the same width, one after the other in memory.
struct Panels {
    int64_t token, tokens;  // of all of them
    int vectors;
    const float* data;
};

// Y[:, row..] for `count` panels that begin with panel `first_panel`.
template <Dtype T, int V, bool Exact>
void block(const Sp24& w, int64_t row, int64_t rows, const Panels& p, int64_t first_panel, int64_t count,
           const Dense& y, const Epilogue& e) {
    constexpr int64_t kTokens = Panel<V>::kTokens, kSize = size_of(T);
    const int64_t metas = w.groups() / 2, panel_size = metas * 8 * kTokens;
    float* c = static_cast<float*>(scratch(1, size_t(count * rows * kTokens) * 4));
    auto* strip = static_cast<Strip<T, V>*>(scratch(2, sizeof(Strip<T, V>)));
    if (metas == 0) __builtin_memset(c, 0, size_t(count * rows * kTokens) * 4);
    for (int64_t at = 0; at < metas; at += kStrip / 8) {
        const int64_t bytes = least(kStrip / 8, metas - at);
        const bool last = at + bytes == metas;
        strip->fill(w, row, rows, at, bytes);
        for (int64_t i = 0; i < count; ++i) {
            const float* x = p.data + (first_panel + i) * panel_size + at * 8 * kTokens;
            const int64_t next = row * metas + at + kStrip / 8;
            const char* values = static_cast<const char*>(w.values) + next * 4 * kSize;
            strip_mm<T, V, Exact>(*strip, rows, bytes, at == 0, last, x, c + i * rows * kTokens,
                                  i == count - 1 && !last ? values : nullptr, w.meta + next, metas);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t past = (first_panel + i) * kTokens, tokens = least(kTokens, p.tokens - past);
        dispatch_float(y.dtype, [&]<Dtype Y>() {
            char* to = static_cast<char*>(y.data) + ((p.token + past) * y.ld + row) * size_of(Y);
            unpack_panel<Y>(c + i * rows * kTokens, int(kTokens), int(tokens), rows, epilogue_from(e, row), to, y.ld);
        });
    }
}

// Vectors in the panel that takes the next of `left` tokens.
int panel_vectors(int64_t left) { return left > 6 * kLanes ? 8 : left > 3 * kLanes ? 4 : 2; }

// X[:, token .. token + tokens) in panels of `vectors` vectors.
void pack(const Dense& x, int64_t kp, const Panels& p, float* data, int threads) {
    constexpr int64_t kDepth = 512;  // k of a task
    const int64_t nt = p.vectors * kLanes, count = (p.tokens + nt - 1) / nt, deep = (kp + kDepth - 1) / kDepth;
    parallel_for(count * deep, threads, [&](int64_t task) {
        const int64_t panel = task / deep, k = task % deep * kDepth, some = least(kDepth, kp - k);
        const int64_t real = least(some, x.cols - k), past = panel * nt;
        float* to = data + panel * kp * nt + k * nt;
        auto run = [&]<Dtype X>() {
            const char* from = static_cast<const char*>(x.data) + ((p.token + past) * x.ld + k) * size_of(X);
            pack_panel<X>(from, x.ld, int(least(nt, p.tokens - past)), real, int(nt), to);
        };
        x.dtype == Dtype::i8 ? run.template operator()<Dtype::i8>() : dispatch_float(x.dtype, run);
        __builtin_memset(to + real * nt, 0, size_t((some - real) * nt) * 4);
    });
}

template <Dtype T, bool Exact>
void run(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    constexpr int64_t kSlab = 512, kTogether = 4;  // tokens packed at a time; panels that share a strip
    const int64_t kp = w.groups() * 4;
    for (int64_t token = 0; token < x.rows;) {
        const int64_t left = x.rows - token;
        Panels p{token, left, panel_vectors(left), nullptr};
        const int64_t nt = p.vectors * kLanes;
        // As many whole panels of this width as there are; the rest takes narrower ones.
        if (left > nt) p.tokens = p.vectors == 8 ? least(kSlab / nt * nt, left / nt * nt) : nt;
        token += p.tokens;
        const int64_t count = (p.tokens + nt - 1) / nt;
        float* data = static_cast<float*>(scratch(0, size_t(most(1, count * nt * kp)) * 4));
        pack(x, kp, p, data, threads);
        p.data = data;
        // Large blocks reuse a tile of X more often; every thread still needs a few of them.
        const int64_t together = least(count, kTogether), groups = (count + together - 1) / together;
        const int64_t step = most(64, least(kBlockRows, w.n * groups / (most(1, threads) * 4) / 16 * 16));
        const int64_t blocks = (w.n + step - 1) / step;
        parallel_for(groups * blocks, threads, [&](int64_t task) {
            const int64_t first = task % groups * together, some = least(together, count - first);
            const int64_t row = task / groups * step, rows = least(step, w.n - row);
            switch (p.vectors) {
                case 8: return block<T, 8, Exact>(w, row, rows, p, first, some, y, e);
                case 4: return block<T, 4, Exact>(w, row, rows, p, first, some, y, e);
                default: return block<T, 2, Exact>(w, row, rows, p, first, some, y, e);
            }
        });
    }
}

}  // namespace

void sp24_mm_panels(const Sp24& w, const Dense& x, const Dense& y, const Epilogue& e, int threads) {
    if (w.n * w.k / 2 * x.rows < kThreadWork) threads = 1;
    switch (w.dtype) {
        case Dtype::f32: return run<Dtype::f32, false>(w, x, y, e, threads);
        case Dtype::bf16: return run<Dtype::bf16, false>(w, x, y, e, threads);
        case Dtype::f16: return run<Dtype::f16, false>(w, x, y, e, threads);
        case Dtype::i8:
            return x.dtype == Dtype::i8 ? run<Dtype::i8, true>(w, x, y, e, threads)
                                        : run<Dtype::i8, false>(w, x, y, e, threads);
    }
}

SK_ISA_END
