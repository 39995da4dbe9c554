#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "conv.h"
#include "conv_topology.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

const sk::ConvTable& table() {
#if SK_BUILT_ISAS >> 4 & 1
    if (sk::active_isa() == sk::Isa::amx) return sk::amx::conv_table;
#endif
#if SK_BUILT_ISAS >> 3 & 1
    if (sk::active_isa() == sk::Isa::avx512_bf16) return sk::avx512_bf16::conv_table;
#endif
#if SK_BUILT_ISAS >> 2 & 1
    if (sk::active_isa() == sk::Isa::avx512) return sk::avx512::conv_table;
#endif
#if SK_BUILT_ISAS >> 1 & 1
    if (sk::active_isa() == sk::Isa::avx2) return sk::avx2::conv_table;
#endif
    return sk::portable::conv_table;
}

template <class T>
T* at(Address p) {
    return reinterpret_cast<T*>(p);
}

// (kh, kw, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left, groups, order)
using Geometry = std::array<int64_t, 10>;
sk::ConvGeometry geometry(const Geometry& g) {
    return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], sk::ConvOrder(g[9])};
}

// (address, dtype, images, channels, height, width, stride_b, stride_c, stride_h, stride_w)
using Tensor = std::array<int64_t, 10>;
sk::ConvTensor tensor(const Tensor& t) {
    return {at<void>(Address(t[0])), sk::Dtype(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
}

// (values, dtype, value count, gather, col, segment, counts, base, start, entries, narrow, rows, columns, stored, tile)
using Stream = std::array<int64_t, 15>;
sk::ConvStream stream(const Stream& s) {
    const auto index = [&](size_t i) { return at<const int32_t>(Address(s[i])); };
    return {at<const void>(Address(s[0])),
            sk::Dtype(s[1]),
            s[2],
            index(3),
            index(4),
            index(5),
            at<const uint16_t>(Address(s[6])),
            index(7),
            index(8),
            at<const void>(Address(s[9])),
            s[10] != 0,
            s[11],
            s[12],
            s[13],
            s[14]};
}

}  // namespace

void bind_conv(py::module_& m) {
    m.def("conv_forward",
          [](const Geometry& g, const Tensor& x, const Tensor& y, const Stream& w, Address bias, int act, int threads) {
              const sk::Epilogue e{nullptr, at<const void>(bias), sk::Dtype(x[1]), sk::Act(act)};
              const sk::ConvForward a{geometry(g), tensor(x), tensor(y), stream(w), e, threads};
              const py::gil_scoped_release release;
              table().forward(a);
          });
    m.def("conv_backward_input",
          [](const Geometry& g, const Tensor& dy, const Tensor& dx, const Stream& w, int threads) {
              const sk::ConvBackwardInput a{geometry(g), tensor(dy), tensor(dx), stream(w), threads};
              const py::gil_scoped_release release;
              table().backward_input(a);
          });
    m.def("conv_backward_weight",
          [](const Geometry& g, const Tensor& dy, const Tensor& x, const Stream& w, Address dvalues, int threads) {
              const sk::ConvBackwardWeight a{geometry(g), tensor(dy), tensor(x), stream(w), at<void>(dvalues), threads};
              const py::gil_scoped_release release;
              table().backward_weight(a);
          });
    m.def("conv_tile", [](int64_t rows, int64_t columns, int64_t k, int64_t stored, int64_t pixels) {
        return table().tile(rows, columns, k, stored, pixels);
    });
    m.def("conv_segments", [](Address crow, Address col, int64_t rows, int64_t tile, int64_t tiles, Address segment) {
        const py::gil_scoped_release release;
        sk::conv_segments(at<const int32_t>(crow), at<const int32_t>(col), rows, tile, tiles, at<int32_t>(segment));
    });
    m.def("conv_blocks", [](Address crow, Address col, Address gather, int64_t rows, int64_t groups, int64_t tile,
                            int64_t tiles, Address counts, Address base, Address start, Address entries) {
        const py::gil_scoped_release release;
        const auto run = [&]<class Entry>(Entry* out) {
            return sk::conv_blocks(at<const int32_t>(crow), at<const int32_t>(col), at<const int32_t>(gather), rows,
                                   groups, tile, tiles, at<uint16_t>(counts), at<int32_t>(base), at<int32_t>(start),
                                   out);
        };
        return gather ? run(at<int32_t>(entries)) : run(at<uint8_t>(entries));
    });
    m.def("conv_transpose", [](const Geometry& g, int64_t channels, Address crow, Address col, Address gather,
                               int64_t rows, Address crow_t, Address col_t, Address gather_t) {
        const py::gil_scoped_release release;
        return sk::conv_transpose(geometry(g), channels, at<const int32_t>(crow), at<const int32_t>(col),
                                  at<const int32_t>(gather), rows, at<int32_t>(crow_t), at<int32_t>(col_t),
                                  at<int32_t>(gather_t));
    });
}
