#include <pybind11/pybind11.h>

#include "host.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

void* at(Address a) { return reinterpret_cast<void*>(a); }
int32_t* ints(Address a) { return reinterpret_cast<int32_t*>(a); }

const sk::CsrTable& table() {
    switch (sk::active_isa()) {
#if SK_BUILT_ISAS >> 1 & 1
        case sk::Isa::avx2: return sk::avx2::csr_table;
#endif
#if SK_BUILT_ISAS >> 2 & 1
        case sk::Isa::avx512: return sk::avx512::csr_table;
#endif
#if SK_BUILT_ISAS >> 3 & 1
        case sk::Isa::avx512_bf16: return sk::avx512_bf16::csr_table;
#endif
#if SK_BUILT_ISAS >> 4 & 1
        case sk::Isa::amx: return sk::amx::csr_table;
#endif
        default:
#if SK_BUILT_ISAS & 1
            return sk::portable::csr_table;
#else
            throw std::runtime_error("no csr kernel was built for this processor");
#endif
    }
}

sk::CsrMatrix matrix(Address values, int dtype, Address crow, Address col, int64_t rows, int64_t cols, Address plan,
                     int tile, Address stream = 0) {
    return {at(values), sk::Dtype(dtype), ints(crow), ints(col), rows, cols, at(plan), tile, at(stream)};
}

}  // namespace

void bind_csr(py::module_& m) {
    m.def("csr_plan_bytes", &sk::csr_plan_bytes);
    m.def("csr_stream_bytes", [](int64_t rows, int64_t cols, int64_t nnz, int tile, int dtype) {
        return sk::csr_stream_bytes(rows, cols, nnz, tile, sk::Dtype(dtype));
    });
    m.def("csr_tile", [](int64_t tokens, int64_t rows, int64_t cols, int64_t nnz) {
        return table().tile(tokens, rows, cols, nnz);
    });
    m.def("csr_plan", [](Address crow, Address col, int64_t rows, int64_t cols, int tile, Address out, int threads) {
        py::gil_scoped_release release;
        table().plan(matrix(0, 0, crow, col, rows, cols, 0, tile), at(out), threads);
    });
    m.def("csr_stream", [](Address values, int dtype, Address crow, Address col, int64_t rows, int64_t cols,
                           Address plan, int tile, Address out, int threads) {
        py::gil_scoped_release release;
        table().stream(matrix(values, dtype, crow, col, rows, cols, plan, tile), at(out), threads);
    });
    m.def("csr_mm", [](Address values, int dtype, Address crow, Address col, int64_t rows, int64_t cols, Address plan,
                       int tile, Address stream, Address x, int x_dtype, int64_t tokens, int64_t ldx, Address y,
                       int y_dtype, int64_t ldy, Address scale, Address bias, int bias_dtype, int act, int threads) {
        py::gil_scoped_release release;
        return table().mm({matrix(values, dtype, crow, col, rows, cols, plan, tile, stream),
                           {at(x), sk::Dtype(x_dtype), tokens, cols, ldx},
                           {at(y), sk::Dtype(y_dtype), tokens, rows, ldy},
                           {static_cast<const float*>(at(scale)), at(bias), sk::Dtype(bias_dtype), sk::Act(act)},
                           threads});
    });
    m.def("csr_mm_t",
          [](Address values, int dtype, Address crow, Address col, int64_t rows, int64_t cols, Address plan, int tile,
             Address dy, int x_dtype, int64_t tokens, int64_t lddy, Address dx, int64_t lddx, int threads) {
              py::gil_scoped_release release;
              table().mm_t({matrix(values, dtype, crow, col, rows, cols, plan, tile),
                            {at(dy), sk::Dtype(x_dtype), tokens, rows, lddy},
                            {at(dx), sk::Dtype(x_dtype), tokens, cols, lddx},
                            threads});
          });
    m.def("csr_sddmm",
          [](Address dvalues, int dtype, Address crow, Address col, int64_t rows, int64_t cols, Address plan, int tile,
             Address dy, int x_dtype, int64_t tokens, int64_t lddy, Address x, int64_t ldx, int threads) {
              py::gil_scoped_release release;
              table().sddmm({matrix(dvalues, dtype, crow, col, rows, cols, plan, tile),
                             {at(dy), sk::Dtype(x_dtype), tokens, rows, lddy},
                             {at(x), sk::Dtype(x_dtype), tokens, cols, ldx},
                             threads});
          });
    m.def("csr_count", [](Address dense, int dtype, int64_t rows, int64_t cols, int64_t ld, Address crow, int threads) {
        py::gil_scoped_release release;
        return table().count({{at(dense), sk::Dtype(dtype), rows, cols, ld}, ints(crow), nullptr, nullptr, threads});
    });
    m.def("csr_fill", [](Address dense, int dtype, int64_t rows, int64_t cols, int64_t ld, Address crow, Address col,
                         Address values, int threads) {
        py::gil_scoped_release release;
        table().fill({{at(dense), sk::Dtype(dtype), rows, cols, ld}, ints(crow), ints(col), at(values), threads});
    });
    m.def("csr_unpack", [](Address dense, int dtype, int64_t rows, int64_t cols, int64_t ld, Address crow, Address col,
                           Address values, int threads) {
        py::gil_scoped_release release;
        table().unpack({{at(dense), sk::Dtype(dtype), rows, cols, ld}, ints(crow), ints(col), at(values), threads});
    });
}
