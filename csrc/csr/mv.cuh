// csr_mv: Y = epilogue(X W^T) for at most four tokens, bound by the weight's bytes.
//
// A subwarp of 8 lanes takes a unit (a row, or a part of a long one), 4 nonzeros a lane at once, two such steps on
// their way. X lies in shared memory as floats, the tokens of a column together, as long as it fits: a gather from
// there costs 3 cycles for 32 nonzeros on average, which are 128 bytes of 16-bit values and columns or 8 cycles of an
// H100's memory; through the first-level cache it would cost a lookup for every nonzero. A block of 16 warps has 64 KB
// on their way.
#pragma once
#include "mm.cuh"

namespace sk::csr {

struct alignas(16) Unit {
    int row, begin, end, split;  // split: -1, or the row's place in `splits`
};

struct Split {
    int slot, count;  // its parts
};

struct Mv {
    const char* values;
    const uint16_t* short_columns;  // or null: K has more than 16 bits. Four more than there are values
    const int32_t* columns;
    const Unit* units;
    const Split* splits;
    const char* x;
    char* y;
    int64_t x_stride, y_stride, nnz;
    int m, n, k, units_count, chunk;  // nonzeros of a part, but for the last one
    bool staged;                      // X fits into shared memory
    const int32_t* crow;
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

template <Type T_, int kTokens_>
struct MvTile {
    static constexpr Type T = T_;
    static constexpr int kTokens = kTokens_, kThreads = 512;
    static constexpr int kSharedBytes = 96 * 1024;  // two blocks an SM
    static_assert(kTokens == 1 || kTokens == 4);
};

template <Type T>
struct FourColumns {
    uint32_t values[device::bytes_of(T)];
    int columns[4];
};

template <Type T>
SK_DEVICE FourColumns<T> load_columns(const Mv& p, int64_t i) {
    using namespace device;
    FourColumns<T> four;
    load_four<T>(four.values, p.values, i, p.nnz);
    if (p.short_columns) {
        const Vec2 c = *reinterpret_cast<const Vec2*>(p.short_columns + i);
        four.columns[0] = c.x & 0xFFFF, four.columns[1] = c.x >> 16;
        four.columns[2] = c.y & 0xFFFF, four.columns[3] = c.y >> 16;
    } else {
        SK_UNROLL
        for (int j = 0; j < 4; ++j) four.columns[j] = i + j < p.nnz ? p.columns[i + j] : 0;
    }
    return four;
}

template <class C>
SK_KERNEL(C::kThreads, 2)
csr_mv(SK_PARAM Mv p) {
    using namespace device;
    constexpr Type T = C::T;
    constexpr int kTokens = C::kTokens;
    auto* staged = reinterpret_cast<float*>(shared_memory());
    const uint32_t thread = thread_index(), my_lane = lane(), sub = my_lane / kSubwarp, chunk = my_lane % kSubwarp;
    if (p.staged) {
        for (int t = 0; t < kTokens; ++t) {
            for (int k = thread; k < p.k; k += C::kThreads) {
                staged[k * kTokens + t] = t < p.m ? load_float(p.x, T, t * p.x_stride + k) : 0.0f;
            }
        }
        sync_block();
    }
    const int warps = grid_x() * (C::kThreads / 32);
    for (int first = (block_x() * (C::kThreads / 32) + warp_index()) * 4; first < p.units_count; first += warps * 4) {
        const bool has = first + static_cast<int>(sub) < p.units_count;
        const Unit unit = has ? p.units[first + sub] : Unit{0, 0, 0, -1};
        float acc[kTokens] = {};
        const auto use = [&](const FourColumns<T>& four, int64_t i) {
            SK_UNROLL
            for (int j = 0; j < 4; ++j) {
                if (i + j < unit.begin || i + j >= unit.end) continue;
                float value;
                if constexpr (T == Type::f32) value = bits_as<float>(four.values[j]);
                if constexpr (T != Type::f32) {
                    const auto bits = static_cast<uint16_t>(four.values[j / 2] >> (16 * (j % 2)));
                    value = T == Type::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
                }
                const int64_t column = four.columns[j];
                SK_UNROLL
                for (int t = 0; t < kTokens; ++t) {
                    float x = 0.0f;
                    if (p.staged) {
                        x = staged[column * kTokens + t];
                    } else if (t < p.m) {
                        x = load_float(p.x, T, t * p.x_stride + column);
                    }
                    acc[t] += value * x;
                }
            }
        };
        constexpr int kStep = 4 * kSubwarp;
        SK_NO_UNROLL
        for (int64_t i = (unit.begin & ~3) + 4 * static_cast<int>(chunk); i < unit.end; i += 2 * kStep) {
            const FourColumns<T> one = load_columns<T>(p, i);
            const bool more = i + kStep < unit.end;
            FourColumns<T> two{};
            if (more) two = load_columns<T>(p, i + kStep);
            use(one, i);
            if (more) use(two, i + kStep);
        }
        SK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            SK_UNROLL
            for (uint32_t mask = kSubwarp / 2; mask; mask /= 2) acc[t] += shuffle_xor(acc[t], mask);
        }
        if (!has || chunk) continue;
        if (unit.split >= 0) {  // its parts lie side by side, the last to come adds them in their order
            const Split split = p.splits[unit.split];
            float* slots = p.partials + int64_t{split.slot} * kTokens;
            const int part = (unit.begin - p.crow[unit.row]) / p.chunk;
            SK_UNROLL
            for (int t = 0; t < kTokens; ++t) slots[part * kTokens + t] = acc[t];
            if (announce(p.counters + unit.split) != static_cast<uint32_t>(split.count - 1)) continue;
            p.counters[unit.split] = 0;
            SK_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                acc[t] = 0;
                for (int i = 0; i < split.count; ++i) acc[t] += load_announced(slots + i * kTokens + t);
            }
        }
        const RowEpilogue r = row_epilogue(p.epilogue, unit.row, true);
        SK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (t >= p.m) continue;
            const float out = scale_and_shift(r, token_scale(p.epilogue, t, true), acc[t]);
            store_one(p.epilogue, p.y, p.y_stride, t, unit.row, out);
        }
    }
}

}  // namespace sk::csr
