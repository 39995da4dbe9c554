// Few tokens: every weight is read once and the memory sets the pace.
//
// A kernel gives run<R, M>(row, token, out, ld): R rows times M tokens, out[m * ld + r]. The driver cuts the rows
// into tasks, walks a task in groups of rows that are in flight together (their streams of values hide each other's
// latency and share the activations), and finishes it with scale, bias and activation.
#pragma once
#include "epilogue.h"
#include "expand.h"
#include "parallel.h"

SK_ISA_BEGIN

inline constexpr int kTokens = 4;                            // tokens of one pass over a row
inline constexpr int kRows = SK_LEVEL >= SK_AVX512 ? 4 : 2;  // rows in flight
inline constexpr int64_t kTaskRows = 64, kTokenBlock = 64;   // bounds of a task's accumulators
inline constexpr int64_t kThreadWork = int64_t(1) << 19;     // multiply-adds below which one thread is faster

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// y[0, count) = act(scale * acc + bias), the columns n.. of an output row.
template <Dtype T>
inline void finish_row(void* y, const float* acc, int64_t n, int64_t count, const Epilogue& e) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int some = int(least(kLanes, count - i));
        Vf v = vf_load(acc + i);
        if (e.scale) {
            float s[kLanes] = {};
            __builtin_memcpy(s, e.scale + n + i, size_t(some) * 4);
            v = v * vf_load(s);
        }
        if (e.bias) v = v + vf_load_bias(e.bias, e.bias_dtype, n + i, some);
        v = vf_act(e.act, v);
        char* to = static_cast<char*>(y) + i * size_of(T);
        if (some == kLanes) {
            vf_store_as<T>(to, v);
        } else {
            for (int j = 0; j < some; ++j) store_as<T>(to, j, v[j]);
        }
    }
}

template <int R, class Kernel>
inline void decode_rows(const Kernel& kernel, int64_t row, int64_t token, int64_t tokens, float* out) {
    for (int64_t m = 0; m < tokens; m += kTokens) {
        float* to = out + m * kTaskRows;
        switch (least(kTokens, tokens - m)) {
            case 1: kernel.template run<R, 1>(row, token + m, to, kTaskRows); break;
            case 2: kernel.template run<R, 2>(row, token + m, to, kTaskRows); break;
            case 3: kernel.template run<R, 3>(row, token + m, to, kTaskRows); break;
            default: kernel.template run<R, 4>(row, token + m, to, kTaskRows); break;
        }
    }
}

// Y[M, n] from a kernel. `work`: multiply-adds of one token.
template <class Kernel>
void decode(const Kernel& kernel, int64_t n, const Dense& y, const Epilogue& e, int64_t work, int threads) {
    if (work * y.rows < kThreadWork) threads = 1;
    // Ends of a task cost a little prefetching, so they are few; but every thread needs some to balance.
    const int64_t step = most(16, least(kTaskRows, n / (int64_t(most(1, threads)) * 8) / 16 * 16));
    for (int64_t token = 0; token < y.rows; token += kTokenBlock) {
        const int64_t tokens = least(kTokenBlock, y.rows - token);
        parallel_for((n + step - 1) / step, threads, [&](int64_t task) {
            const int64_t first = task * step, last = least(n, first + step);
            alignas(64) float out[kTokenBlock * kTaskRows + kLanes];
            int64_t row = first;
            for (; row + kRows <= last; row += kRows)
                decode_rows<kRows>(kernel, row, token, tokens, out + (row - first));
            for (; row < last; ++row) decode_rows<1>(kernel, row, token, tokens, out + (row - first));
            dispatch_float(y.dtype, [&]<Dtype T>() {
                for (int64_t m = 0; m < tokens; ++m) {
                    char* to = static_cast<char*>(y.data) + ((token + m) * y.ld + first) * size_of(T);
                    finish_row<T>(to, out + m * kTaskRows, first, last - first, e);
                }
            });
        });
    }
}

// ---- activations, packed once per call ---------------------------------------------------------------------

// X as float rows of `width` >= cols elements, zeros behind the last column. Lives in scratch memory.
inline const float* floats_of(const Dense& x, int64_t width, int slot) {
    float* to = static_cast<float*>(scratch(slot, size_t(most(1, x.rows * width)) * 4));
    for (int64_t m = 0; m < x.rows; ++m) {
        float* row = to + m * width;
        const char* from = static_cast<const char*>(x.data) + m * x.ld * size_of(x.dtype);
        auto copy = [&]<Dtype T>() {
            int64_t k = 0;
            for (; k + kLanes <= x.cols; k += kLanes) vf_store(row + k, vf_load_as<T>(from + k * size_of(T)));
            for (; k < x.cols; ++k) row[k] = load_as<T>(from, k);
        };
        if (x.dtype == Dtype::i8) {
            copy.template operator()<Dtype::i8>();
        } else {
            dispatch_float(x.dtype, copy);
        }
        __builtin_memset(row + x.cols, 0, size_t(width - x.cols) * 4);
    }
    return to;
}

// X as it is, rows of `width` elements, zeros behind the last column.
inline const void* padded_rows(const Dense& x, int64_t width, int slot) {
    const int64_t size = size_of(x.dtype);
    char* to = static_cast<char*>(scratch(slot, size_t(most(1, x.rows * width * size))));
    for (int64_t m = 0; m < x.rows; ++m) {
        char* row = to + m * width * size;
        if (x.cols) __builtin_memcpy(row, static_cast<const char*>(x.data) + m * x.ld * size, size_t(x.cols * size));
        __builtin_memset(row + x.cols * size, 0, size_t((width - x.cols) * size));
    }
    return to;
}

SK_ISA_END
