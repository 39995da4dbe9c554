// The tensor-core instructions as the PTX ISA defines them, for the emulator: operands are gathered from the threads'
// registers and from swizzled shared memory into dense matrices, multiplied, and scattered back.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <type_traits>
#include <vector>

#include "numeric.h"

namespace sk::device::twin {

template <Type T>
Accumulator<T> element(uint32_t bits) {
    if constexpr (T == Type::bf16) return bf16_to_float(static_cast<uint16_t>(bits));
    if constexpr (T == Type::f16) return f16_to_float(static_cast<uint16_t>(bits));
    if constexpr (T == Type::e4m3) return e4m3_to_float(static_cast<uint8_t>(bits));
    if constexpr (T == Type::i8) return static_cast<int8_t>(bits);
}

// Element i of a register that holds 4 / bytes_of(T) of them.
template <Type T>
Accumulator<T> element_of(uint32_t reg, int i) {
    if constexpr (is_wide(T)) return element<T>(reg >> (16 * i) & 0xFFFF);
    return element<T>(reg >> (8 * i) & 0xFF);
}

// The logical width of one sparse product along K: 32 of 16 bits, 64 of 8 bits. The stored width is half of it.
template <Type T>
constexpr int kSparseK = 64 / bytes_of(T);

// A warp's sparse A operand as a dense [16, kSparseK] matrix. regs(lane, i) and meta(lane) give the registers.
// 16-bit: the selector says which lane pair of each quad holds the metadata; 8-bit: all four do, selector 0.
template <Type T, class Regs, class Meta>
std::vector<Accumulator<T>> expand_a(Regs regs, Meta meta, int selector) {
    constexpr int kPer = 4 / bytes_of(T), kK = kSparseK<T>;
    std::vector<Accumulator<T>> dense(16 * kK);
    for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < kK / 2; ++c) {
            const int within = c % (4 * kPer);
            const int lane = r % 8 * 4 + within / kPer, reg = r / 8 + 2 * (c / (4 * kPer));
            const int group = c / 2;
            uint32_t nibble;
            if constexpr (is_wide(T)) {
                nibble = meta(r % 8 * 4 + 2 * selector + group / 4) >> (16 * (r / 8) + 4 * (group % 4)) & 15;
            } else {
                nibble = meta(r % 8 * 4 + r / 8 + 2 * (group / 8)) >> (4 * (group % 8)) & 15;
            }
            if ((nibble & 3) >= nibble >> 2) emu::fail("sparse metadata whose two indices do not ascend");
            const int at = c % 2 ? nibble >> 2 : nibble & 3;
            dense[r * kK + 4 * group + at] = element_of<T>(regs(lane, reg), c % kPer);
        }
    }
    return dense;
}

// A warp's dense A operand as a [16, 32 / bytes] matrix.
template <Type T, class Regs>
std::vector<Accumulator<T>> dense_a(Regs regs) {
    constexpr int kPer = 4 / bytes_of(T), kK = 8 * kPer;
    std::vector<Accumulator<T>> dense(16 * kK);
    for (int r = 0; r < 16; ++r) {
        for (int k = 0; k < kK; ++k) {
            const int lane = r % 8 * 4 + k % (4 * kPer) / kPer, reg = r / 8 + 2 * (k / (4 * kPer));
            dense[r * kK + k] = element_of<T>(regs(lane, reg), k % kPer);
        }
    }
    return dense;
}

// How many bits of its sums a tensor core keeps for fp8; 0, the default: all of a float's.
inline int& fp8_sum_bits() {
    static int bits = 0;
    return bits;
}

// sum + a b as the tensor cores of Ada and Hopper add up fp8: every addend is cut off, towards zero, at the last of
// `bits` bits counted from the largest one's first, and so is the result (14 bits: DeepSeek-V3, arXiv
// 2412.19437, 3.3.2; e8m13: SageAttention2, arXiv 2411.10958). A model: the hardware takes an instruction's products in
// several goes, whose sizes are not documented; here all of them are one.
inline float narrow_sum(float sum, const float* a, const float* b, int k, int bits) {
    const auto cut = [bits](double value, double largest) {
        const double unit = std::ldexp(1.0, std::ilogb(largest) + 1 - bits);
        return std::trunc(value / unit) * unit;
    };
    double largest = std::fabs(sum), total = sum;
    for (int i = 0; i < k; ++i) {
        if (a[i] == 0) continue;
        largest = std::fmax(largest, std::fabs(a[i] * b[i]));
        total += a[i] * b[i];
    }
    if (largest == 0 || !std::isfinite(total)) return static_cast<float>(total);
    total = cut(sum, largest);
    for (int i = 0; i < k; ++i) {
        if (a[i] != 0) total += cut(a[i] * b[i], largest);
    }
    return total == 0 ? 0.0f : static_cast<float>(cut(total, total));
}

// D[16, n] += A[16, k] B[k, n], with b(k, n) and c(row, col) -> a reference.
template <Type T, class B, class C>
void multiply(const std::vector<Accumulator<T>>& a, int k, int n, B b, C c) {
    std::vector<Accumulator<T>> column(k);
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < k; ++i) column[i] = b(i, j);
        for (int r = 0; r < 16; ++r) {
            if constexpr (T == Type::e4m3) {
                if (fp8_sum_bits()) {
                    c(r, j) = narrow_sum(c(r, j), a.data() + r * k, column.data(), k, fp8_sum_bits());
                    continue;
                }
            }
            Accumulator<T> sum = 0;
            for (int i = 0; i < k; ++i) {
                const auto x = a[r * k + i];
                if (x != 0) sum += x * column[i];  // a stored zero meets no NaN: it is not multiplied in hardware's K
            }
            c(r, j) += sum;
        }
    }
}

// How many asynchronous products are in flight towards an accumulator, by its address in the group's first thread.
inline std::map<const void*, int>& in_flight() {
    static std::map<const void*, int> counts;
    return counts;
}

template <class T>
T poison() {
    if constexpr (std::is_same_v<T, int32_t>) return 0x55555555;
    if constexpr (std::is_same_v<T, float>) return __builtin_nanf("");
}

}  // namespace sk::device::twin
