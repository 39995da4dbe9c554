// csr_mv: Y = epilogue(X W^T) for at most four tokens, bound by the weight's bytes.
//
// A subwarp of 8 lanes takes a unit (a row, or a part of one), 4 nonzeros a lane at once, two such steps on their way
// in each of the 4 units of a warp. Values are read in place. A column is told by 8 bits, how much further it is than
// the one before in its unit: a lane adds up its four, three exchanges add up the lanes of both steps at once, and the
// unit says where it begins. A unit ends where a distance needs more than 8 bits. Where that would be often (below a
// density of 0.025 one in 600), columns are numbers of 16 or 32 bits. Bytes a nonzero with 16-bit values:
//   density                                          0.05   0.1   0.2   0.3
//   columns of 16 bits                               4.00  4.00  4.00  4.00
//   distances of 8 bits                              3.00  3.00  3.00  3.00
//   bitmap (one bit a weight)                        4.50  3.25  2.63  2.42
//   distances of 4 bits, a zero stored where 16 pass 4.46  3.07  2.57  2.51  a copy of the values, stale in training
//   distances of 4 bits, values in place             2.89  2.61  2.51  2.50
// The last one is not built: 13 % fewer bytes at 0.1, and behind a skipped 16 a lane's values are no longer where its
// number says: a second scan, and four loads of 2 bytes instead of one of 8. For 32 nonzeros that makes 8 cycles of
// the load unit instead of 4.5, where an H100's memory takes 5 (6 with 8 bits, 8 with 16). From 0.2 on a weight that
// is stored as a bitmap has fewer bytes by its bits; bitmap/cuda.py chooses.
//
// X lies in shared memory as floats, the tokens of a column together, as long as it fits: a gather from there costs 3
// cycles for 32 nonzeros on average (12 for four tokens, which then bound an H100); through the first-level cache it
// would cost a lookup for every nonzero. A block of 16 warps has 48 KB on their way.
// Beyond four tokens csr_mm is bound by its reads of X, a cycle for each nonzero and strip of tokens: its 4 bytes a
// nonzero are a quarter of an H100's bandwidth, so that shorter ones would gain nothing there.
#pragma once
#include "mm.cuh"

namespace sk::csr {

// Nonzeros [begin, end) of a row; the first one's column. split: -1, or the row's place in `splits`, of which this is
// part `part`.
struct alignas(16) Unit {
    int row, begin, end, column, split, part, unused[2];
};

struct Split {
    int slot, count;  // its parts
};

struct Mv {
    const char* values;
    // The columns: one of the three. Four more of the short ones than there are values.
    const uint8_t* distances;
    const uint16_t* short_columns;  // or null: K has more than 16 bits
    const int32_t* columns;
    const Unit* units;
    const Split* splits;
    const char* x;
    char* y;
    int64_t x_stride, y_stride, nnz;
    int m, n, k, units_count;
    bool staged;  // X fits into shared memory
    float* partials;
    uint32_t* counters;
    device::Epilogue epilogue;
};

template <Type T_, int kTokens_, bool kDistances_>
struct MvTile {
    static constexpr Type T = T_;
    static constexpr bool kDistances = kDistances_;
    static constexpr int kTokens = kTokens_, kThreads = 512;
    static constexpr int kSharedBytes = 96 * 1024;  // two blocks an SM
    static_assert(kTokens == 1 || kTokens == 4);
};

template <Type T>
struct FourColumns {
    uint32_t values[device::bytes_of(T)];
    int columns[4];  // or the four distances, in the first
};

template <class C>
SK_DEVICE FourColumns<C::T> load_columns(const Mv& p, int64_t i) {
    using namespace device;
    FourColumns<C::T> four;
    load_four<C::T>(four.values, p.values, i, p.nnz);
    if constexpr (C::kDistances) {
        four.columns[0] = *reinterpret_cast<const int*>(p.distances + i);
    } else if (p.short_columns) {
        const Vec2 c = *reinterpret_cast<const Vec2*>(p.short_columns + i);
        four.columns[0] = c.x & 0xFFFF, four.columns[1] = c.x >> 16;
        four.columns[2] = c.y & 0xFFFF, four.columns[3] = c.y >> 16;
    } else {
        SK_UNROLL
        for (int j = 0; j < 4; ++j) four.columns[j] = i + j < p.nnz ? p.columns[i + j] : 0;
    }
    return four;
}

// The four distances of nonzeros i.. become sums from the lane's first one on; those of other units, and to the unit's
// first, count nothing. Returns all four.
template <Type T>
SK_DEVICE uint32_t add_distances(FourColumns<T>& four, int64_t i, const Unit& unit) {
    const auto bytes = static_cast<uint32_t>(four.columns[0]);
    int sum = 0;
    SK_UNROLL
    for (int j = 0; j < 4; ++j) {
        sum += i + j > unit.begin && i + j < unit.end ? static_cast<int>(bytes >> (8 * j) & 0xFF) : 0;
        four.columns[j] = sum;
    }
    return static_cast<uint32_t>(sum);
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
        const Unit unit = has ? p.units[first + sub] : Unit{0, 0, 0, 0, -1, 0, {}};
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
        // As many steps as the longest of the warp's units has: lanes exchange their sums.
        int steps = (unit.end - (unit.begin & ~3) + 2 * kStep - 1) / (2 * kStep), column = unit.column;
        SK_UNROLL
        for (uint32_t mask = kSubwarp; C::kDistances && mask < 32; mask *= 2) {
            const int other = shuffle_xor(steps, mask);
            steps = other > steps ? other : steps;
        }
        SK_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
            const int64_t i = int64_t{unit.begin & ~3} + 4 * static_cast<int>(chunk) + step * 2 * kStep;
            FourColumns<T> one{}, two{};
            if (i < unit.end) one = load_columns<C>(p, i);
            if (i + kStep < unit.end) two = load_columns<C>(p, i + kStep);
            if constexpr (C::kDistances) {
                // Of step one in the low half, of step two in the high one: 8 * 4 * 255 at most.
                const uint32_t mine = add_distances<T>(one, i, unit) | add_distances<T>(two, i + kStep, unit) << 16;
                uint32_t sum = mine;
                SK_UNROLL
                for (uint32_t back = 1; back < kSubwarp; back *= 2) {
                    const uint32_t other = shuffle(sum, my_lane - back);
                    if (chunk >= back) sum += other;
                }
                const uint32_t all = shuffle(sum, my_lane | (kSubwarp - 1));
                const int before_one = column + static_cast<int>((sum - mine) & 0xFFFF);
                const int before_two = column + static_cast<int>(all & 0xFFFF) + static_cast<int>((sum - mine) >> 16);
                SK_UNROLL
                for (int j = 0; j < 4; ++j) one.columns[j] += before_one, two.columns[j] += before_two;
                column += static_cast<int>(all & 0xFFFF) + static_cast<int>(all >> 16);
            }
            use(one, i);
            use(two, i + kStep);
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
            SK_UNROLL
            for (int t = 0; t < kTokens; ++t) slots[unit.part * kTokens + t] = acc[t];
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
