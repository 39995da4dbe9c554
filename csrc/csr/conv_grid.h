// Zero-padded planes: the geometry that turns every tap of a convolution into an offset.
//
// A plane holds one channel of one stride phase, rows of `pitch` floats, so that output position (i, j) of tap (r, s)
// reads element (i + du) * pitch + j + dv: a strip of consecutive positions is a strip of consecutive floats, whatever
// stride, padding or dilation. The zero columns right of a row serve as those left of the next one, and the zero rows
// below an image as those above the next, so that a strip runs across rows and images with little waste; what it
// computes between them is dropped when it is written.
#pragma once
#include "../core/parallel.h"
#include "conv_tile.h"

SK_ISA_BEGIN

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct ConvGrid {
    int64_t gh, gw;             // output positions of one image
    int64_t step_h, step_w;     // row u of phase (a, b) holds source row u * step_h + a - pad_h
    int64_t pad_h, pad_w;       // may be negative: cropped
    int64_t halo_h, halo_w;     // the largest du and dv
    int64_t image_rows, pitch;  // filled in by finish()
    int64_t phases;
    const int32_t* phase;  // a * step_w + b of each phase that a tap needs
    bool compact;          // strips skip what lies between lines and images, for which they must be packed

    void finish(int64_t height, int64_t width) {
        pitch = gw + halo_w - shared(pad_w, step_w, gw, halo_w, width);
        image_rows = gh + halo_h - shared(pad_h, step_h, gh, halo_h, height);
    }

private:
    // How many leading zero positions of a line double as the trailing ones of the line before; outputs stay apart.
    static int64_t shared(int64_t pad, int64_t step, int64_t outputs, int64_t halo, int64_t source) {
        const int64_t before = floor_div(pad, step), after = outputs + halo - ceil_div(source + pad, step);
        return most(0, least(least(before, after), halo));
    }
};

// Column k reads plane plane[k] (channel within the group * phases + phase), -1 for zeros, at shift du * pitch + dv.
struct ConvTaps {
    int32_t* plane;
    int32_t* shift;
};

// One piece of the output: rows [row0, row0 + rows) of group `group` for `count` images from `image` on, output rows
// [line, line + lines) of each (all of them where count > 1).
struct ConvTask {
    int64_t image, count, line, lines, group, row0, rows;
};

// Where grid position (i, j) of row n lies in a tensor: offset + n * stride_n + i * stride_i + j * stride_j elements,
// for the positions inside [i0, i1) x [j0, j1). One map per block of rows.
struct ConvMap {
    int64_t i0, i1, j0, j1, offset, stride_i, stride_j;
};

struct Strip {
    int64_t first;  // in vectors
    int vectors;
};

// Positions from one line to the next, and lines from one image to the next, along the strips of a task.
inline int64_t line_step(const ConvGrid& g) { return g.compact ? g.gw : g.pitch; }
inline int64_t image_step(const ConvGrid& g, const ConvTask& t) { return g.compact ? t.lines : g.image_rows; }
inline int64_t task_length(const ConvGrid& g, const ConvTask& t) {
    return ((t.count - 1) * image_step(g, t) + t.lines - 1) * line_step(g) + g.gw;
}
inline int64_t strip_count(int64_t vectors) { return (vectors + kStripVectors - 1) / kStripVectors; }
inline Strip strip_of(int64_t vectors, int64_t s) {
    const int64_t n = strip_count(vectors), first = vectors * s / n;
    return {first, int(vectors * (s + 1) / n - first)};
}
inline int64_t plane_lines(const ConvGrid& g, const ConvTask& t) {
    return (t.count - 1) * g.image_rows + t.lines + g.halo_h;
}
// Floats from one plane to the next: every strip read stays inside, and planes do not fall on the same cache sets.
inline int64_t plane_size(const ConvGrid& g, const ConvTask& t) {
    const int64_t size = ((plane_lines(g, t) + 1) * g.pitch + g.halo_w + 3 * kLanes + 15) / 16 * 16;
    return size % 256 == 0 ? size + 16 : size;
}

template <Dtype T>
inline Vf load_part(const void* p, int count) {
#if SK_LEVEL >= SK_AVX512
    const unsigned mask = count >= kLanes ? 0xffffu : (1u << count) - 1;
    if constexpr (T == Dtype::f32) return (Vf)_mm512_maskz_loadu_ps(__mmask16(mask), p);
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    return vf_load_as<T>(&half);
#else
    return vf_load_part<T>(p, count);
#endif
}

template <Dtype T>
inline void store_part(void* p, Vf v, int count) {
#if SK_LEVEL >= SK_AVX512
    if (count >= kLanes) return vf_store_as<T>(p, v);
    const unsigned mask = (1u << count) - 1;
    if constexpr (T == Dtype::f32) return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
    alignas(32) char part[32];
    vf_store_as<T>(part, v);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
#else
    vf_store_part<T>(p, v, count);
#endif
}

// out[j] = in[j * step], j < count, as floats; may write up to kLanes - 1 floats beyond. Reads nothing beyond.
template <Dtype T>
void copy_line(const char* in, int64_t step, int64_t count, float* out) {
    if (step == 1) {
        int64_t j = 0;
        for (; j + kLanes <= count; j += kLanes) vf_store(out + j, vf_load_as<T>(in + j * size_of(T)));
        if (j < count) vf_store(out + j, load_part<T>(in + j * size_of(T), int(count - j)));
    } else {
        for (int64_t j = 0; j < count; ++j) out[j] = load_as<T>(in, j * step);
    }
}

// out[c * out_stride + j] = in[j * step + c] as floats for c < channels, j < count: pixels of channels-last images.
template <Dtype T>
void copy_pixels(const char* in, int64_t step, int64_t count, int64_t channels, float* out, int64_t out_stride) {
    const int64_t stride = step * size_of(T);
    for (int64_t c = 0; c < channels; c += kLanes) {
        const int cs = int(least(channels - c, kLanes));
        for (int64_t j = 0; j < count; j += kLanes) {
            const int js = int(least(count - j, kLanes));
            const char* p = in + j * stride + c * size_of(T);
            Vf r[kLanes];
            if (js == kLanes && cs == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) r[i] = vf_load_as<T>(p + i * stride);
            } else {
                for (int i = 0; i < kLanes; ++i) r[i] = i < js ? load_part<T>(p + i * stride, cs) : Vf{};
            }
            transpose(r);
            float* o = out + c * out_stride + j;
            if (js == kLanes && cs == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) vf_store(o + i * out_stride, r[i]);
            } else {
                for (int i = 0; i < cs; ++i) store_part<Dtype::f32>(o + i * out_stride, r[i], js);
            }
        }
    }
}

inline void zero(float* p, int64_t count) {
    if (count <= 4)
        for (; count > 0; --count) *p++ = 0;
    else
        __builtin_memset(p, 0, size_t(count) * sizeof(float));
}

// The source line and columns that plane line `line` of a task holds.
struct PlaneLine {
    const char* data;      // of the first column present
    int64_t first, count;  // plane columns [first, first + count) come from the source, the others are zero
};
inline PlaneLine plane_line(const ConvGrid& g, const ConvTensor& x, const ConvTask& t, int64_t line, int64_t phase) {
    const int64_t nth = least(line / g.image_rows, t.count - 1);
    const int64_t y = (line - nth * g.image_rows + t.line) * g.step_h + phase / g.step_w - g.pad_h;
    if (y < 0 || y >= x.height) return {nullptr, 0, 0};
    const int64_t shift = phase % g.step_w - g.pad_w;  // column v holds source column v * step_w + shift
    const int64_t first = least(g.pitch, most(0, ceil_div(-shift, g.step_w)));
    const int64_t last = least(g.pitch, ceil_div(x.width - shift, g.step_w));
    const int64_t at = (t.image + nth) * x.stride_b + y * x.stride_h + (first * g.step_w + shift) * x.stride_w;
    return {static_cast<const char*>(x.data) + at * size_of(x.dtype), first, most(0, last - first)};
}

// Fills the planes of channels [c0, c1) (counted within the tensor), plane (c0, phase 0) first. `table` has room for
// one entry per line and phase.
template <Dtype T>
void fill_planes(const ConvGrid& g, const ConvTensor& x, const ConvTask& t, int64_t c0, int64_t c1, float* planes,
                 PlaneLine* table) {
    const int64_t size = plane_size(g, t), lines = plane_lines(g, t);
    for (int64_t p = 0; p < g.phases; ++p)
        for (int64_t line = 0; line < lines; ++line) table[p * lines + line] = plane_line(g, x, t, line, g.phase[p]);
    if (x.stride_w == 1) {
        for (int64_t c = c0; c < c1; ++c)
            for (int64_t p = 0; p < g.phases; ++p, planes += size) {
                float* out = planes;  // upwards: what a copy spills beyond its end is written again
                for (int64_t line = 0; line < lines; ++line, out += g.pitch) {
                    const PlaneLine& from = table[p * lines + line];
                    zero(out, from.first);
                    if (from.count)
                        copy_line<T>(from.data + c * x.stride_c * size_of(T), g.step_w, from.count, out + from.first);
                    zero(out + from.first + from.count, g.pitch - from.first - from.count);
                }
                zero(out, size - lines * g.pitch);
            }
    } else {
        zero(planes, (c1 - c0) * g.phases * size);
        for (int64_t p = 0; p < g.phases; ++p)
            for (int64_t line = 0; line < lines; ++line) {
                const PlaneLine& from = table[p * lines + line];
                if (from.count)
                    copy_pixels<T>(from.data + c0 * size_of(T), g.step_w * x.stride_w, from.count, c1 - c0,
                                   planes + p * size + line * g.pitch + from.first, g.phases * size);
            }
    }
}

// A run of pixels of one strip that lies in a tensor: `count` of them from strip position `at`, element `offset`.
struct Piece {
    int32_t at, count;
    int64_t offset;
};

// The pieces of strip positions [q, q + length) inside a map; at most length of them.
inline int64_t make_pieces(const ConvGrid& g, const ConvTask& t, const ConvMap& m, int64_t stride_b, int64_t q,
                           int64_t length, Piece* out) {
    int64_t made = 0;
    const int64_t step = line_step(g), lines = image_step(g, t);
    for (int64_t line = q / step; line * step < q + length; ++line) {
        const int64_t nth = line / lines, i = line - nth * lines + t.line;
        if (nth >= t.count || i - t.line >= t.lines || i < m.i0 || i >= m.i1) continue;
        const int64_t start = line * step - q;  // strip position of j = 0
        const int64_t j0 = most(m.j0, -start), j1 = least(m.j1, length - start);
        if (j0 >= j1) continue;
        const int64_t offset = m.offset + (t.image + nth) * stride_b + i * m.stride_i + j0 * m.stride_j;
        if (made) {
            Piece& last = out[made - 1];
            if (last.at + last.count == start + j0 && last.offset + last.count * m.stride_j == offset) {
                last.count += int32_t(j1 - j0);
                continue;
            }
        }
        out[made++] = {int32_t(start + j0), int32_t(j1 - j0), offset};
    }
    return made;
}

// panel[k - k0] = `vectors` vectors of pixels from position q on, k in [k0, k1), one column after the other.
inline void pack_planes(const ConvTaps& taps, const float* planes, int64_t size, int64_t q, int vectors, int64_t k0,
                        int64_t k1, float* panel) {
    dispatch_strip(vectors, [&]<int U>() {
        for (int64_t k = k0; k < k1; ++k, panel += U * kLanes) {
            if (taps.plane[k] < 0) {
                zero(panel, U * kLanes);
                continue;
            }
            const float* p = planes + taps.plane[k] * size + taps.shift[k] + q;
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) vf_store(panel + u * kLanes, vf_load(p + u * kLanes));
        }
    });
}

// The same of a compact grid: the pieces of the strip one after the other. Spills up to kLanes - 1 floats.
inline void pack_pieces(const ConvTaps& taps, const float* planes, int64_t size, const Piece* pieces, int64_t count,
                        int vectors, int64_t k0, int64_t k1, float* panel) {
    const int filled = count ? pieces[count - 1].at + pieces[count - 1].count : 0;
    for (int64_t k = k0; k < k1; ++k, panel += vectors * kLanes) {
        if (taps.plane[k] < 0) {
            zero(panel, vectors * kLanes);
            continue;
        }
        const float* p = planes + taps.plane[k] * size + taps.shift[k];
        for (int64_t i = 0; i < count; ++i)  // upwards: what a piece spills the next one overwrites
            for (int j = 0; j < pieces[i].count; j += kLanes)
                vf_store(panel + pieces[i].at + j, vf_load(p + pieces[i].offset + j));
        if (filled < vectors * kLanes) vf_store(panel + filled, Vf{});
    }
}

// The same from planes that are the tensor itself (1x1, stride 1): `left` pixels from `data` on, zeros after them.
template <Dtype T>
void pack_pixels(const char* data, int64_t stride_c, int64_t channels, int64_t left, int vectors, int64_t k0,
                 int64_t k1, float* panel) {
    for (int64_t k = k0; k < k1; ++k, panel += vectors * kLanes) {
        if (k >= channels) {
            zero(panel, vectors * kLanes);
            continue;
        }
        const char* p = data + k * stride_c * size_of(T);
        for (int u = 0; u < vectors; ++u, p += kLanes * size_of(T)) {
            const int64_t count = left - u * kLanes;
            vf_store(panel + u * kLanes, count >= kLanes ? vf_load_as<T>(p)
                                         : count > 0     ? load_part<T>(p, int(count))
                                                         : Vf{});
        }
    }
}

// y = act(acc + bias) for `rows` rows of a strip; y and bias begin at the first row.
template <Dtype T, Act A>
void write_strip(const float* acc, int vectors, int64_t rows, const Piece* pieces, int64_t count, const Epilogue& e,
                 char* y, int64_t stride_n, int64_t stride_j) {
    const int width = vectors * kLanes;
    if (stride_j != 1 && stride_n == 1) {
        for (int64_t i = 0; i < count; ++i)
            unpack_panel_act<T, A>(acc + pieces[i].at, width, pieces[i].count, rows, e,
                                   y + pieces[i].offset * size_of(T), stride_j);
        return;
    }
    for (int64_t n = 0; n < rows; ++n, acc += width, y += stride_n * size_of(T)) {
        const Vf bias =
            e.bias ? vf_set(dispatch_float(e.bias_dtype, [&]<Dtype B>() { return load_as<B>(e.bias, n); })) : Vf{};
        for (int64_t i = 0; i < count; ++i) {
            const float* in = acc + pieces[i].at;
            char* out = y + pieces[i].offset * size_of(T);
            for (int j = 0; j < pieces[i].count; j += kLanes) {
                const Vf v = vf_act<A>(vf_load(in + j) + bias);
                const int left = pieces[i].count - j < kLanes ? pieces[i].count - j : kLanes;
                if (stride_j == 1) {
                    store_part<T>(out + j * size_of(T), v, left);
                } else {
                    for (int l = 0; l < left; ++l) store_as<T>(out, (j + l) * stride_j, v[l]);
                }
            }
        }
    }
}

// The reverse for gradients: rows of a strip from a tensor, zeros at positions that no output has.
template <Dtype T>
void read_strip(const char* y, int64_t stride_n, int64_t stride_j, const Piece* pieces, int64_t count, int64_t rows,
                int vectors, float* out) {
    const int width = vectors * kLanes;
    zero(out, rows * width);
    if (stride_j != 1 && stride_n == 1) {
        for (int64_t i = 0; i < count; ++i)
            copy_pixels<T>(y + pieces[i].offset * size_of(T), stride_j, pieces[i].count, rows, out + pieces[i].at,
                           width);
        return;
    }
    for (int64_t n = 0; n < rows; ++n, out += width, y += stride_n * size_of(T))
        for (int64_t i = 0; i < count; ++i) {
            const char* in = y + pieces[i].offset * size_of(T);
            for (int j = 0; j < pieces[i].count; j += kLanes) {
                const int left = pieces[i].count - j < kLanes ? pieces[i].count - j : kLanes;
                if (stride_j == 1) {
                    store_part<Dtype::f32>(out + pieces[i].at + j, load_part<T>(in + j * size_of(T), left), left);
                } else {
                    for (int l = 0; l < left; ++l) out[pieces[i].at + j + l] = load_as<T>(in, (j + l) * stride_j);
                }
            }
        }
}

SK_ISA_END
