// sp24_repack: every way between a dense weight, canonical sp24 and fragment order, in one pass over the weight.
//
// A thread block of 128 threads takes one block of the fragments, 64 rows x 128 bytes of K, from one of seven sources
// to any of four destinations. Bytes moved for N x K weights of 16 bits (a copy moves 4 N K), with what the 8-bit types
// move in brackets (a copy: 2 N K):
//   dense -> fragments                        2 + 1.125 (1 + 0.625)       0.78 (0.81) of a copy
//   dense -> fragments and canonical          2 + 2.25  (1 + 1.25)        1.06 (1.13)
//   dense -> fragments of W and of W^T        2 + 2.25                    1.06   (4 x 4 transposable mask)
//   canonical <-> fragments                   2.25      (1.25)            0.56 (0.63)
//   canonical -> dense                        3.125     (1.625)           0.78 (0.81)
//   dense, metadata -> values (sample)        3.125     (1.625)           0.78 (0.81)
// Global accesses are 16 bytes wide, whole 32-byte sectors of 16 rows at a time, four loads in flight in each thread.
// Rows that do not begin at a multiple of 16 bytes, and the last columns, go element by element.
//
// Lane 4 g + t of warp w holds 16-byte chunks of row 16 w + 8 (t % 2) + g: chunk 4 s + 2 r + t / 2 of the row's eight,
// for s, r = 0, 1. Two lanes that differ in t % 2 exchange words and have mma.sp's A fragments; two that differ in
// t / 2 exchange chunks and have 16 contiguous bytes of canonical values.
#pragma once
#include "fragments.cuh"
#include "patterns.cuh"

namespace sk::sp24 {

enum class From : int {
    top2,          // dense: the two of largest magnitude in each group (NaN largest of all, ties: the lower index)
    strict,        // dense: the nonzeros; a group with more than two of them is told to `first`
    mask,          // dense, mask: the entries that the mask keeps, checked like strict
    transposable,  // dense: the 4 x 4 pattern, two in each row and column, that keeps the largest sum of magnitudes
    sample,        // dense, metadata: the entries at the stored places
    canonical,     // values, metadata
    fragments,
};

struct Repack {
    const char* dense;
    const uint8_t* mask;
    const char* values;
    const uint8_t* metadata;
    const char* fragments;
    char* to_fragments;  // the destinations; null: not wanted
    char* to_transposed;
    char* to_values;
    uint8_t* to_metadata;
    char* to_dense;
    // [0]: row * groups + group of the first group with more than two entries to keep; [1]: the same of W^T.
    uint64_t* first;
    int64_t dense_stride, mask_stride, to_dense_stride;  // bytes
    int n, k, row_blocks, k_blocks;
    int row_bytes;                                        // of the dense weight
    int values_bytes, metadata_bytes;                     // of a canonical row
    uint32_t sign_free, top;                              // magnitude: min(bits & sign_free, top)
    Type type;                                            // 16 bits: bf16 or f16; 8 bits: i8 or e4m3
    bool vector_dense, vector_values;                     // every row of the source begins at a multiple of 16 bytes
    bool vector_mask, vector_to_dense, vector_to_values;  // (the mask's: of 8 or 16 bytes, as a chunk has)
};

namespace forms {

// Sixteen bytes of a dense row: eight elements of 16 bits or sixteen of 8. Kept: half of them, and a nibble a group.
struct Chunk {
    uint32_t words[2];
    uint32_t nibbles;  // 8 or 16 bits
};

// Bits of a group's entries to keep -> its nibble. Filled up with the last others, so nothing kept is (2, 3) = 0xE;
// of more than two the first two.
constexpr uint64_t kNibbles = [] {
    uint64_t table = 0;
    for (int keep = 0; keep < 16; ++keep) {
        int bits = keep, pair[2] = {0, 0}, found = 0, count = 0;
        for (int i = 0; i < 4; ++i) count += keep >> i & 1;
        for (int i = 3; i >= 0 && count < 2; --i) {
            if (!(bits >> i & 1)) bits |= 1 << i, ++count;
        }
        for (int i = 0; i < 4 && found < 2; ++i) {
            if (bits >> i & 1) pair[found++] = i;
        }
        table |= static_cast<uint64_t>(pair[0] | pair[1] << 2) << 4 * keep;
    }
    return table;
}();

SK_DEVICE uint32_t nibble_of(uint32_t keep) { return static_cast<uint32_t>(kNibbles >> 4 * (keep & 15)) & 15; }

template <bool kWide>
constexpr int kGroups = kWide ? 2 : 4;  // of a chunk
template <bool kWide>
constexpr uint32_t kEmpty = kWide ? 0xEE : 0xEEEE;

template <bool kWide>
SK_DEVICE uint32_t nibbles_of(uint32_t keep) {
    uint32_t out = 0;
    SK_UNROLL
    for (int g = 0; g < kGroups<kWide>; ++g) out |= nibble_of(keep >> 4 * g) << 4 * g;
    return out;
}

// The entries of a chunk at its nibbles.
template <bool kWide>
SK_DEVICE void select(Chunk& c, const uint32_t (&d)[4]) {
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
        uint32_t selector;
        if constexpr (kWide) {  // word i: the pair of group i
            const uint32_t nibble = c.nibbles >> 4 * i & 15;
            selector = 0x1010 + (nibble & 3) * 0x22 + (nibble >> 2) * 0x2200;
        } else {  // word i: the pairs of groups 2 i and 2 i + 1
            const uint32_t pair = c.nibbles >> 8 * i & 255;
            selector = 0x4400 | (pair & 3) | (pair >> 2 & 3) << 4 | (pair >> 4 & 3) << 8 | pair >> 6 << 12;
        }
        c.words[i] = device::permute_bytes(d[2 * i], d[2 * i + 1], selector);
    }
}

// The chunk with its zeros. Byte 4 of permute_bytes is zero here.
template <bool kWide>
SK_DEVICE void expand(uint32_t (&d)[4], const Chunk& c) {
    SK_UNROLL
    for (int g = 0; g < kGroups<kWide>; ++g) {
        const uint32_t nibble = c.nibbles >> 4 * g & 15, low = nibble & 3, high = nibble >> 2;
        if constexpr (kWide) {
            const uint32_t selector = 0x44444444u ^ 0x54u << 8 * low ^ 0x76u << 8 * high;
            d[2 * g] = device::permute_bytes(c.words[g], 0, selector);
            d[2 * g + 1] = device::permute_bytes(c.words[g], 0, selector >> 16);
        } else {
            const uint32_t first = g % 2 * 2;
            const uint32_t selector = 0x4444u ^ (4 ^ first) << 4 * low ^ (4 ^ (first + 1)) << 4 * high;
            d[g] = device::permute_bytes(c.words[g / 2], 0, selector);
        }
    }
}

// A bit for each nonzero of a chunk; -0.0 is zero, NaN is not.
template <bool kWide>
SK_DEVICE uint32_t nonzeros(const uint32_t (&d)[4], uint32_t sign_free) {
    constexpr int kPer = kWide ? 2 : 4;
    uint32_t bits = 0;
    SK_UNROLL
    for (int i = 0; i < 4 * kPer; ++i) {
        const uint32_t element = (kWide ? 0xFFFFu : 0xFFu) << i % kPer * (32 / kPer);
        bits |= uint32_t{(d[i / kPer] & sign_free & element) != 0} << i;
    }
    return bits;
}

template <bool kWide>
SK_DEVICE uint32_t element(const uint32_t (&d)[4], int i) {
    if constexpr (kWide) return d[i / 2] >> i % 2 * 16 & 0xFFFF;
    return d[i / 4] >> i % 4 * 8 & 0xFF;
}

template <bool kWide>
SK_DEVICE uint32_t magnitude(const Repack& p, uint32_t bits) {
    if (!kWide && p.type == Type::i8) return bits & 0x80 ? 256 - bits : bits;
    bits &= p.sign_free & 0xFFFF;
    return bits < p.top ? bits : p.top;
}

// A bit for each of the two largest of every group.
template <bool kWide>
SK_DEVICE uint32_t largest(const Repack& p, const uint32_t (&d)[4]) {
    uint32_t keep = 0;
    SK_UNROLL
    for (int g = 0; g < kGroups<kWide>; ++g) {
        uint32_t a[4];
        int beaten[4] = {0, 0, 0, 0};
        SK_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = magnitude<kWide>(p, element<kWide>(d, 4 * g + i));
        SK_UNROLL
        for (int i = 0; i < 3; ++i) {
            SK_UNROLL
            for (int j = i + 1; j < 4; ++j) {
                const bool later = a[j] > a[i];
                beaten[i] += later;
                beaten[j] += !later;
            }
        }
        SK_UNROLL
        for (int i = 0; i < 4; ++i) keep |= uint32_t{beaten[i] < 2} << (4 * g + i);
    }
    return keep;
}

// Tells the first group of the chunk that keeps more than two.
template <bool kWide>
SK_DEVICE void tell_crowded(uint64_t* first, uint32_t keep, int64_t group) {
    SK_UNROLL
    for (int g = kGroups<kWide> - 1; g >= 0; --g) {
        if (device::count_bits(keep >> 4 * g & 15) > 2) device::keep_smallest(first, group + g);
    }
}

// Sixteen bytes at `at` of a row of `bytes`; zeros beyond it.
template <bool kWide>
SK_DEVICE void load(uint32_t (&d)[4], const char* row, int at, int bytes, bool vector) {
    if (vector && at + 16 <= bytes) {
        const Vec4 v = device::load_stream(row + at);
        d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
        return;
    }
    constexpr int kSize = kWide ? 2 : 1;
    SK_UNROLL
    for (int i = 0; i < 4; ++i) d[i] = 0;
    SK_UNROLL
    for (int i = 0; i < 16; i += kSize) {
        if (at + i >= bytes) continue;
        uint32_t bits;
        if constexpr (kWide) {
            bits = *reinterpret_cast<const uint16_t*>(row + at + i);
        } else {
            bits = *reinterpret_cast<const uint8_t*>(row + at + i);
        }
        d[i / 4] |= bits << i % 4 * 8;
    }
}

template <bool kWide>
SK_DEVICE void store(const uint32_t (&d)[4], char* row, int at, int bytes, bool vector) {
    if (vector && at + 16 <= bytes) {
        *reinterpret_cast<Vec4*>(row + at) = {d[0], d[1], d[2], d[3]};
        return;
    }
    constexpr int kSize = kWide ? 2 : 1;
    SK_UNROLL
    for (int i = 0; i < 16; i += kSize) {
        if (at + i >= bytes) continue;
        const uint32_t bits = d[i / 4] >> i % 4 * 8;
        if constexpr (kWide) {
            *reinterpret_cast<uint16_t*>(row + at + i) = static_cast<uint16_t>(bits);
        } else {
            *reinterpret_cast<uint8_t*>(row + at + i) = static_cast<uint8_t>(bits);
        }
    }
}

// The bits of a chunk's mask, a byte an element at `at` of a row of `columns`; clears what is not kept.
template <bool kWide>
SK_DEVICE uint32_t masked(uint32_t (&d)[4], const uint8_t* row, int at, int columns, bool vector) {
    constexpr int kCount = kWide ? 8 : 16, kPer = kWide ? 2 : 4;
    uint32_t bits = 0;
    if (vector && at + kCount <= columns) {
        SK_UNROLL
        for (int i = 0; i < kCount; i += 8) {
            const uint64_t bytes = *reinterpret_cast<const uint64_t*>(row + at + i);
            SK_UNROLL
            for (int j = 0; j < 8; ++j) bits |= uint32_t{(bytes >> 8 * j & 255) != 0} << (i + j);
        }
    } else {
        SK_UNROLL
        for (int i = 0; i < kCount; ++i) bits |= uint32_t{at + i < columns && row[at + i]} << i;
    }
    SK_UNROLL
    for (int i = 0; i < kCount; ++i) {
        const uint32_t place = (kWide ? 0xFFFFu : 0xFFu) << i % kPer * (32 / kPer);
        if (!(bits >> i & 1)) d[i / kPer] &= ~place;
    }
    return bits;
}

// `mine` for what the lane whose index differs by `mask` has brought as its `mine`.
SK_DEVICE void exchange(Chunk& mine, uint32_t mask) {
    mine.words[0] = device::shuffle_xor(mine.words[0], mask);
    mine.words[1] = device::shuffle_xor(mine.words[1], mask);
    mine.nibbles = device::shuffle_xor(mine.nibbles, mask);
}

// Bits of canonical metadata of two neighbouring chunks: 2 or 4 bytes, `empty` beyond the row.
template <bool kWide>
SK_DEVICE uint32_t load_metadata(const uint8_t* row, int at, int bytes) {
    uint32_t out = 0;
    SK_UNROLL
    for (int i = 0; i < (kWide ? 2 : 4); ++i) out |= uint32_t{at + i < bytes ? row[at + i] : uint8_t{0xEE}} << 8 * i;
    return out;
}

// Canonical values of this lane's two chunks of step s, from the 16 bytes (v) and the metadata (bits) of both lanes'
// chunks r = t / 2; and back.
template <bool kWide>
SK_DEVICE void from_row(Chunk (&c)[2], const uint32_t (&v)[4], uint32_t bits, uint32_t half) {
    constexpr int kBits = kWide ? 8 : 16;
    const Chunk left{{v[0], v[1]}, bits & ((1u << kBits) - 1)}, right{{v[2], v[3]}, bits >> kBits};
    Chunk other = half ? left : right;
    exchange(other, 2);
    c[0] = half ? other : left;
    c[1] = half ? right : other;
}

template <bool kWide>
SK_DEVICE void to_row(const Chunk (&c)[2], uint32_t (&v)[4], uint32_t& bits, uint32_t half) {
    Chunk other = half ? c[0] : c[1];
    exchange(other, 2);
    const Chunk left = half ? other : c[0], right = half ? c[1] : other;
    v[0] = left.words[0], v[1] = left.words[1], v[2] = right.words[0], v[3] = right.words[1];
    bits = left.nibbles | right.nibbles << (kWide ? 8 : 16);
}

// The block in fragment order (fragments.cuh). Every thread of the block takes part, c[s][r].
template <bool kWide>
SK_DEVICE void store_fragments(const Chunk (&c)[2][2], char* block, uint32_t thread) {
    const uint32_t t = thread & 3, odd = t & 1, half = t >> 1;
    SK_UNROLL
    for (int s = 0; s < 2; ++s) {
        uint32_t a[4];
        SK_UNROLL
        for (int r = 0; r < 2; ++r) {
            const uint32_t* words = c[s][r].words;
            const uint32_t other = device::shuffle_xor(odd ? words[0] : words[1], 1);
            a[2 * r] = odd ? other : words[0];
            a[2 * r + 1] = odd ? words[1] : other;
        }
        *reinterpret_cast<Vec4*>(block + s * kStepBytes + thread * 16) = {a[0], a[1], a[2], a[3]};
    }
    auto* metadata = reinterpret_cast<uint32_t*>(block + kSteps * kStepBytes);
    if constexpr (kWide) {
        // Byte q of `mine` goes to lane t = q of the quad, where this lane's byte is number 2 odd + half.
        const uint32_t mine = c[0][0].nibbles | c[0][1].nibbles << 8 | c[1][0].nibbles << 16 | c[1][1].nibbles << 24;
        uint32_t word = 0;
        SK_UNROLL
        for (int d = 0; d < 4; ++d) {
            const uint32_t theirs = device::shuffle_xor(mine, d), from = t ^ d;
            word |= (theirs >> 8 * t & 255) << 8 * (2 * (from & 1) + (from >> 1));
        }
        metadata[thread] = word;
    } else {
        SK_UNROLL
        for (int s = 0; s < 2; ++s) {
            const uint32_t left = c[s][0].nibbles, right = c[s][1].nibbles;
            const uint32_t other = device::shuffle_xor(half ? left : right, 2), own = half ? right : left;
            metadata[s * 128 + thread] = half ? other | own << 16 : own | other << 16;
        }
    }
}

template <bool kWide>
SK_DEVICE void take_fragments(Chunk (&c)[2][2], const char* block, uint32_t thread) {
    constexpr Type T = kWide ? Type::bf16 : Type::i8;
    const uint32_t t = thread & 3, odd = t & 1, half = t >> 1;
    BlockFragments<T> f;
    load_fragments<T>(f, block, thread);
    SK_UNROLL
    for (int s = 0; s < 2; ++s) {
        SK_UNROLL
        for (int r = 0; r < 2; ++r) {
            const uint32_t low = f.a[s][2 * r], high = f.a[s][2 * r + 1];
            const uint32_t other = device::shuffle_xor(odd ? low : high, 1);
            c[s][r].words[0] = odd ? other : low;
            c[s][r].words[1] = odd ? high : other;
        }
    }
    if constexpr (kWide) {
        uint32_t mine = 0;
        SK_UNROLL
        for (int d = 0; d < 4; ++d) {
            const uint32_t theirs = device::shuffle_xor(f.meta[0], d);
            mine |= (theirs >> 8 * (2 * odd + half) & 255) << 8 * (t ^ d);
        }
        SK_UNROLL
        for (int q = 0; q < 4; ++q) c[q / 2][q % 2].nibbles = mine >> 8 * q & 255;
    } else {
        SK_UNROLL
        for (int s = 0; s < 2; ++s) {
            const uint32_t word = f.meta[s];
            const uint32_t own = half ? word >> 16 : word & 0xFFFF;
            const uint32_t other = device::shuffle_xor(half ? word & 0xFFFF : word >> 16, 2);
            c[s][0].nibbles = half ? other : own;
            c[s][1].nibbles = half ? own : other;
        }
    }
}

}  // namespace forms

// Whether the kernel has the tile in shared memory, and with it W^T as a destination.
SK_ANYWHERE constexpr bool has_tile(bool wide, From from) {
    return wide && (from == From::transposable || from == From::canonical);
}

template <bool kWide, From kFrom>
SK_KERNEL(128, 1)
sp24_repack(SK_PARAM Repack p) {
    using namespace forms;
    constexpr bool kTile = has_tile(kWide, kFrom);
    static_assert(kFrom != From::transposable || kTile);
    const uint32_t thread = device::thread_index(), t = thread & 3, odd = t & 1, half = t >> 1;
    const int row_block = device::block_x() / p.k_blocks, k_block = device::block_x() % p.k_blocks;
    const int local = thread / 32 * 16 + odd * 8 + thread % 32 / 4, row = row_block * kBlockRows + local;
    const bool inside = row < p.n;
    const auto chunk_at = [&](int s, int r) { return 4 * s + 2 * r + static_cast<int>(half); };
    Chunk c[2][2];

    if constexpr (kFrom == From::fragments) {
        take_fragments<kWide>(c, p.fragments + int64_t{device::block_x()} * (kWide ? 4608 : 5120), thread);
    } else {
        constexpr bool kRows = kFrom == From::canonical || kFrom == From::sample;  // has metadata
        uint32_t bits[2];
        if constexpr (kRows) {
            SK_UNROLL
            for (int s = 0; s < 2; ++s) {
                const int at = k_block * (kWide ? 8 : 16) + (2 * s + half) * (kWide ? 2 : 4);
                bits[s] = load_metadata<kWide>(p.metadata + int64_t{row} * p.metadata_bytes, at,
                                               inside ? p.metadata_bytes : 0);
            }
        }
        uint32_t d[2][2][4];
        if constexpr (kFrom == From::canonical) {
            SK_UNROLL
            for (int s = 0; s < 2; ++s) {
                load<kWide>(d[s][0], p.values + int64_t{row} * p.values_bytes, k_block * 64 + s * 32 + half * 16,
                            inside ? p.values_bytes : 0, p.vector_values);
            }
        } else {
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                load<kWide>(d[i / 2][i % 2], p.dense + row * p.dense_stride,
                            k_block * 128 + chunk_at(i / 2, i % 2) * 16, inside ? p.row_bytes : 0, p.vector_dense);
            }
        }
        if constexpr (kRows) {
            SK_UNROLL
            for (int s = 0; s < 2; ++s) {
                if constexpr (kFrom == From::canonical) {
                    from_row<kWide>(c[s], d[s][0], bits[s], half);
                } else {
                    const uint32_t none[4] = {0, 0, 0, 0};  // the nibbles alone: values come from `dense`
                    from_row<kWide>(c[s], none, bits[s], half);
                }
            }
        }
        uint16_t* patterns = nullptr;
        if constexpr (kFrom == From::transposable) {
            auto* tile = reinterpret_cast<uint32_t*>(device::shared_memory());
            patterns = reinterpret_cast<uint16_t*>(device::shared_memory() + kTileBytes);
            SK_UNROLL
            for (int i = 0; i < 4; ++i) store_tile(tile, d[i / 2][i % 2], local, chunk_at(i / 2, i % 2));
            device::sync_block();
            find_patterns(tile, patterns, p.type, thread);
            device::sync_block();
        }
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            Chunk& chunk = c[i / 2][i % 2];
            auto& dense = d[i / 2][i % 2];
            const int at = chunk_at(i / 2, i % 2);
            const int groups = (p.k + 7) / 8 * 2, group = (k_block * 8 + at) * kGroups<kWide>;
            if constexpr (kFrom == From::top2) {
                chunk.nibbles = nibbles_of<kWide>(nonzeros<kWide>(dense, p.sign_free) & largest<kWide>(p, dense));
            }
            if constexpr (kFrom == From::strict || kFrom == From::mask) {
                uint32_t keep;
                if constexpr (kFrom == From::strict) {
                    keep = nonzeros<kWide>(dense, p.sign_free);
                } else {
                    keep =
                        masked<kWide>(dense, p.mask + row * p.mask_stride, group * 4, inside ? p.k : 0, p.vector_mask);
                }
                tell_crowded<kWide>(p.first, keep, int64_t{row} * groups + group);
                chunk.nibbles = nibbles_of<kWide>(keep);
            }
            if constexpr (kFrom == From::transposable) {
                const uint16_t* tiles = patterns + local / 4 * 16 + 2 * at;
                const int shift = local % 4 * 4;
                // What lies outside of the matrix is empty, whatever the pattern of its zeros.
                const uint32_t left = inside && 4 * group < p.k ? tiles[0] >> shift & 15 : 0xE;
                const uint32_t right = inside && 4 * group + 4 < p.k ? tiles[1] >> shift & 15 : 0xE;
                chunk.nibbles = left | right << 4;
            }
            if constexpr (kFrom != From::canonical) select<kWide>(chunk, dense);
        }
    }

    if (p.to_fragments) {
        store_fragments<kWide>(c, p.to_fragments + int64_t{device::block_x()} * (kWide ? 4608 : 5120), thread);
    }
    if (p.to_values || p.to_metadata) {
        SK_UNROLL
        for (int s = 0; s < 2; ++s) {
            uint32_t v[4], bits;
            to_row<kWide>(c[s], v, bits, half);
            if (p.to_values) {
                store<kWide>(v, p.to_values + int64_t{row} * p.values_bytes, k_block * 64 + s * 32 + half * 16,
                             inside ? p.values_bytes : 0, p.vector_to_values);
            }
            if (p.to_metadata) {
                const int at = k_block * (kWide ? 8 : 16) + (2 * s + half) * (kWide ? 2 : 4);
                uint8_t* to = p.to_metadata + int64_t{row} * p.metadata_bytes;
                SK_UNROLL
                for (int i = 0; i < (kWide ? 2 : 4); ++i) {
                    if (inside && at + i < p.metadata_bytes) to[at + i] = static_cast<uint8_t>(bits >> 8 * i);
                }
            }
        }
    }
    if (p.to_dense) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t d[4];
            expand<kWide>(d, c[i / 2][i % 2]);
            store<kWide>(d, p.to_dense + row * p.to_dense_stride, k_block * 128 + chunk_at(i / 2, i % 2) * 16,
                         inside ? p.row_bytes : 0, p.vector_to_dense);
        }
    }
    if constexpr (kTile) {
        if (!p.to_transposed) return;
        auto* tile = reinterpret_cast<uint32_t*>(device::shared_memory());
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t d[4];
            expand<kWide>(d, c[i / 2][i % 2]);
            store_tile(tile, d, local, chunk_at(i / 2, i % 2));
        }
        device::sync_block();
        const auto* elements = reinterpret_cast<const uint16_t*>(tile);
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {  // now `local` is a column of the tile and a chunk is eight of its rows
            uint32_t d[4];
            const int at = chunk_at(i / 2, i % 2);
            SK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t low = elements[(8 * at + 2 * j) * 2 * kPitch + local];
                d[j] = low | uint32_t{elements[(8 * at + 2 * j + 1) * 2 * kPitch + local]} << 16;
            }
            const uint32_t keep = nonzeros<true>(d, p.sign_free);
            if (p.first && k_block * 64 + local < p.k) {  // not what is stored beyond K
                const int64_t groups = (p.n + 7) / 8 * 2, group = (row_block * 8 + at) * 2;
                tell_crowded<true>(p.first + 1, keep, (int64_t{k_block} * 64 + local) * groups + group);
            }
            c[i / 2][i % 2].nibbles = nibbles_of<true>(keep);
            select<true>(c[i / 2][i % 2], d);
        }
        store_fragments<true>(c, p.to_transposed + (int64_t{k_block} * p.row_blocks + row_block) * 4608, thread);
    }
}

}  // namespace sk::sp24
