#include <pybind11/pybind11.h>

#include <cstdint>

#include "host.h"

namespace py = pybind11;

namespace {

using sk::Dtype;
using Pointer = uintptr_t;

const sk::BsrTable& table() {
    switch (sk::active_isa()) {
#if SK_BUILT_ISAS & 2
        case sk::Isa::avx2: return sk::avx2::bsr_table;
#endif
#if SK_BUILT_ISAS & 4
        case sk::Isa::avx512: return sk::avx512::bsr_table;
#endif
#if SK_BUILT_ISAS & 8
        case sk::Isa::avx512_bf16: return sk::avx512_bf16::bsr_table;
#endif
#if SK_BUILT_ISAS & 16
        case sk::Isa::amx: return sk::amx::bsr_table;
#endif
        default: return sk::portable::bsr_table;
    }
}

template <class T = void>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

sk::BsrWeight weight(Pointer values, int dtype, Pointer scale, int64_t n, int64_t k, int64_t r, int64_t c) {
    return {at(values), Dtype(dtype), at<const float>(scale), n, k, r, c};
}

void mm(Pointer values, int dtype, Pointer scale, Pointer crow, Pointer col, int64_t n, int64_t k, int64_t r, int64_t c,
        Pointer x, int x_dtype, int64_t m, int64_t ldx, Pointer y, int y_dtype, int64_t ldy, Pointer bias,
        int bias_dtype, int activation, int threads) {
    py::gil_scoped_release release;
    table().mm({weight(values, dtype, scale, n, k, r, c),
                at<const int32_t>(crow),
                at<const int32_t>(col),
                {at(x), Dtype(x_dtype), m, k, ldx},
                {at(y), Dtype(y_dtype), m, n, ldy},
                {nullptr, at(bias), Dtype(bias_dtype), sk::Act(activation)},
                threads});
}

void mm_t(Pointer values, int dtype, Pointer scale, Pointer crow_t, Pointer row_t, Pointer gather_t, int64_t n,
          int64_t k, int64_t r, int64_t c, Pointer dy, int dy_dtype, int64_t m, int64_t lddy, Pointer dx, int64_t lddx,
          int threads) {
    py::gil_scoped_release release;
    table().mm_t({weight(values, dtype, scale, n, k, r, c),
                  at<const int32_t>(crow_t),
                  at<const int32_t>(row_t),
                  at<const int32_t>(gather_t),
                  {at(dy), Dtype(dy_dtype), m, n, lddy},
                  {at(dx), Dtype(dy_dtype), m, k, lddx},
                  threads});
}

void sddmm(Pointer dvalues, int dtype, Pointer crow, Pointer col, int64_t n, int64_t k, int64_t r, int64_t c,
           Pointer dy, int64_t lddy, Pointer x, int64_t ldx, int64_t m, int threads) {
    py::gil_scoped_release release;
    table().sddmm({weight(dvalues, dtype, 0, n, k, r, c),
                   at<const int32_t>(crow),
                   at<const int32_t>(col),
                   {at(dy), Dtype(dtype), m, n, lddy},
                   {at(x), Dtype(dtype), m, k, ldx},
                   threads});
}

void count(Pointer dense, int dtype, int64_t ld, int64_t n, int64_t k, int64_t r, int64_t c, Pointer flags,
           Pointer crow, int threads) {
    py::gil_scoped_release release;
    table().count(
        {at(dense), ld, Dtype(dtype), n, k, r, c, at<uint8_t>(flags), at<int32_t>(crow), nullptr, nullptr, threads});
}

void fill(Pointer dense, int dtype, int64_t ld, int64_t n, int64_t k, int64_t r, int64_t c, Pointer flags, Pointer crow,
          Pointer col, Pointer values, int threads) {
    py::gil_scoped_release release;
    table().fill({at(dense), ld, Dtype(dtype), n, k, r, c, at<uint8_t>(flags), at<int32_t>(crow), at<int32_t>(col),
                  at(values), threads});
}

void unpack(Pointer dense, int dtype, int64_t ld, int64_t n, int64_t k, int64_t r, int64_t c, Pointer crow, Pointer col,
            Pointer values, int threads) {
    py::gil_scoped_release release;
    table().unpack(
        {at(dense), ld, Dtype(dtype), n, k, r, c, nullptr, at<int32_t>(crow), at<int32_t>(col), at(values), threads});
}

void transpose_index(Pointer crow, Pointer col, int64_t grid_rows, int64_t grid_cols, Pointer crow_t, Pointer row_t,
                     Pointer gather_t) {
    py::gil_scoped_release release;
    table().transpose_index({at<const int32_t>(crow), at<const int32_t>(col), grid_rows, grid_cols, at<int32_t>(crow_t),
                             at<int32_t>(row_t), at<int32_t>(gather_t)});
}

}  // namespace

void bind_bsr(py::module_& m) {
    m.def("bsr_mm", mm);
    m.def("bsr_mm_t", mm_t);
    m.def("bsr_sddmm", sddmm);
    m.def("bsr_count", count);
    m.def("bsr_fill", fill);
    m.def("bsr_unpack", unpack);
    m.def("bsr_transpose_index", transpose_index);
}
