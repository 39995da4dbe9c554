// What the csr kernels share: the choice of panels, walking a plan, values as floats.
#pragma once
#include <algorithm>

#include "../core/panel.h"
#include "../core/parallel.h"
#include "host.h"

SK_ISA_BEGIN

inline constexpr int kMaxVectors = 8;              // in the widest panel: its sums fill half the registers
inline constexpr int64_t kL1Panel = 32 << 10;      // bytes of x to be reused from L1
inline constexpr int kMaxTile = 256;               // columns are bytes inside a tile
inline constexpr int64_t kSerialWork = 1'500'000;  // multiply-adds below which one thread is fastest

// Splits `tokens` into panels of at most kMaxVectors vectors, as even as can be.
struct Panels {
    int64_t tokens, vectors, count;

    Panels(int64_t m, int widest)
        : tokens(m), vectors((m + kLanes - 1) / kLanes), count((vectors + widest - 1) / widest) {}
    int64_t first_vector(int64_t p) const { return vectors * p / count; }
    int64_t token(int64_t p) const { return first_vector(p) * kLanes; }
    int width(int64_t p) const { return int(first_vector(p + 1) - first_vector(p)); }  // in vectors
    int used(int64_t p) const { return int(std::min(tokens, token(p + 1)) - token(p)); }
};

// Vectors in the panels of tiled work. Wide panels load fewer values and columns per multiply-add; below one weight in
// seven a segment of a tile beside a wide panel is so short that loading and storing its accumulators costs more.
inline int widest_panel(int64_t rows, int64_t cols, int64_t nnz) {
    return nnz * 7 < rows * cols ? kMaxVectors / 2 : kMaxVectors;
}
inline int widest_panel(const CsrMatrix& w) { return widest_panel(w.rows, w.cols, w.crow[w.rows]); }

// Calls f.template operator()<NV>() for a panel that is `vectors` wide.
template <class F>
inline void dispatch_width(int vectors, F&& f) {
    switch (vectors) {
        case 1: return f.template operator()<1>();
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
        case 4: return f.template operator()<4>();
        case 5: return f.template operator()<5>();
        case 6: return f.template operator()<6>();
        case 7: return f.template operator()<7>();
        default: return f.template operator()<8>();
    }
}

// values[start .. start + count) as floats: in place where they are floats, else converted into `buffer`, which has
// room for kLanes more than count.
template <Dtype T>
inline const float* floats(const void* values, int64_t start, int64_t count, float* buffer) {
    const char* p = static_cast<const char*>(values) + start * size_of(T);
    if constexpr (T == Dtype::f32) {
        return reinterpret_cast<const float*>(p);
    } else {
        for (int64_t j = 0; j < count; j += kLanes)
            vf_store(buffer + j, vf_load_part<T>(p + j * size_of(T), int(std::min<int64_t>(count - j, kLanes))));
        return buffer;
    }
}

template <class F>
inline auto dispatch_values(Dtype t, F&& f) {
    if (t == Dtype::i8) return f.template operator()<Dtype::i8>();
    return dispatch_float(t, f);
}

// A plan as the kernels walk it.
struct Blocks {
    int64_t rows, cols, block, blocks, tiles;
    int tile;
    const CsrSegment* segments;
    const uint32_t* begins;
    const uint8_t* columns;

    Blocks(const CsrMatrix& w, const void* plan)
        : rows(w.rows),
          cols(w.cols),
          block(csr_block_rows(w.rows)),
          blocks(csr_blocks(w.rows)),
          tiles(csr_tiles(w.cols, w.tile)),
          tile(w.tile),
          segments(static_cast<const CsrSegment*>(plan)),
          begins(reinterpret_cast<const uint32_t*>(segments + csr_plan_segments(w.rows, w.cols, w.tile))),
          columns(reinterpret_cast<const uint8_t*>(begins + blocks * tiles)) {}
    int64_t rows_of(int64_t b) const { return std::min(block, rows - b * block); }
    const CsrSegment* group(int64_t b, int64_t t) const { return segments + (b * tiles + t) * block; }
    int64_t begin(int64_t b, int64_t t) const { return begins[b * tiles + t]; }
    int64_t tile_begin(int64_t t) const { return t * tile; }
    int64_t tile_size(int64_t t) const { return std::min<int64_t>(cols - t * tile, tile); }
};

// Hashes the share of w.values that belongs to a group: a block's values, cut evenly by tiles. Work on the group calls
// step() once a row, which spreads the reading over it; finish() reads what is left.
class Watch {
public:
    Watch(const CsrMatrix& w, const Blocks& blocks, int64_t b, int64_t tile) : rows_(blocks.rows_of(b)) {
        const int64_t n0 = b * blocks.block, first = w.crow[n0], all = w.crow[n0 + rows_] - first;
        const char* values = static_cast<const char*>(w.values) + first * size_of(w.dtype);
        at_ = values + all * tile / blocks.tiles * size_of(w.dtype);
        end_ = values + all * (tile + 1) / blocks.tiles * size_of(w.dtype);
        vectors_ = (end_ - at_) / int64_t(sizeof(Vu));
    }
    void step() {
        __builtin_prefetch(at_ + kAhead);
        for (credit_ += vectors_; credit_ >= rows_; credit_ -= rows_) take(sizeof(Vu));
    }
    uint32_t finish() {
        while (end_ - at_ >= int64_t(sizeof(Vu))) take(sizeof(Vu));
        if (at_ < end_) take(size_t(end_ - at_));
        uint32_t all = 0;
        for (int i = 0; i < kLanes; ++i) all = (all ^ hash_[i]) * 0x9e3779b1u;
        return all;
    }

private:
    static constexpr int64_t kAhead = 1024;

    void take(size_t bytes) {
        Vu v = {};
        __builtin_memcpy(&v, at_, bytes);
        hash_ = (hash_ << 7 | hash_ >> 25) + v;
        at_ += bytes;
    }

    const char *at_, *end_;
    Vu hash_ = {};
    int64_t rows_, vectors_, credit_ = 0;
};

inline uint32_t* stream_hashes(const CsrMatrix& w, const void* stream) {
    char* base = static_cast<char*>(const_cast<void*>(stream));
    return reinterpret_cast<uint32_t*>(base + csr_stream_hashes(w.crow[w.rows], w.dtype));
}

int csr_tile(int64_t m, int64_t rows, int64_t cols, int64_t nnz);
void csr_plan(const CsrMatrix& w, void* out, int threads);

// The caller's plan, or one made now in scratch memory (w.tile then becomes the one it was made for).
inline const void* plan_of(CsrMatrix& w, int64_t m, int threads) {
    if (w.plan) return w.plan;
    const int tile = csr_tile(m, w.rows, w.cols, w.crow[w.rows]);
    w.tile = tile ? tile : kMaxTile;
    w.stream = nullptr;
    void* made = scratch(3, size_t(csr_plan_bytes(w.rows, w.cols, w.crow[w.rows], w.tile)));
    csr_plan(w, made, threads);
    return made;
}

// always_inline: g++ takes a function of nothing but prefetches for one without effect and drops its calls.
[[gnu::always_inline]] inline void prefetch(const void* p, int64_t bytes) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes);
    for (uintptr_t line = reinterpret_cast<uintptr_t>(p) & ~uintptr_t(63); line < end; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(line));
}

inline void pack(const Dense& x, int64_t token, int used, int64_t k0, int64_t count, int width, float* out) {
    dispatch_float(x.dtype, [&]<Dtype T>() {
        const char* from = static_cast<const char*>(x.data) + (token * x.ld + k0) * size_of(T);
        pack_panel<T>(from, x.ld, used, count, width, out);
    });
}

// Cuts rows [0, rows) at multiples of `unit` into `parts` ranges of about equal nonzeros: the first row of part p.
inline int64_t split_rows(const CsrMatrix& w, int64_t unit, int64_t parts, int64_t p) {
    if (p <= 0) return 0;
    if (p >= parts) return w.rows;
    // A row costs a little even when empty: count each as four nonzeros.
    const auto cost = [&](int64_t n) { return int64_t(w.crow[n]) + 4 * n; };
    const int64_t want = cost(w.rows) * p / parts;
    int64_t low = 0, high = w.rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        cost(middle) < want ? low = middle + 1 : high = middle;
    }
    return std::min(w.rows, (low + unit / 2) / unit * unit);
}

SK_ISA_END
