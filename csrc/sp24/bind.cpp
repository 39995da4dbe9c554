// Python entries of the sp24 host kernels; pointers and sizes as integers, see host.h for their meaning.
#include <pybind11/pybind11.h>

#include "host.h"

namespace py = pybind11;

namespace {

const sk::Sp24Kernels& table() { SK_RETURN_ACTIVE_TABLE(sp24_kernels) }

template <class T = void>
T* at(uintptr_t p) {
    return reinterpret_cast<T*>(p);
}

sk::Sp24 weight(uintptr_t values, uintptr_t meta, int dtype, int64_t n, int64_t k) {
    return {at(values), at<const uint8_t>(meta), sk::Dtype(dtype), n, k};
}

}  // namespace

void bind_sp24(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def(
        "sp24_mm",
        [](uintptr_t values, uintptr_t meta, uintptr_t scale, int dtype, int64_t n, int64_t k, uintptr_t x, int x_dtype,
           int64_t tokens, int64_t ldx, uintptr_t y, int y_dtype, int64_t ldy, uintptr_t bias, int bias_dtype, int act,
           int threads) {
            table().mm(weight(values, meta, dtype, n, k), {at(x), sk::Dtype(x_dtype), tokens, k, ldx},
                       {at(y), sk::Dtype(y_dtype), tokens, n, ldy},
                       {at<const float>(scale), at(bias), sk::Dtype(bias_dtype), sk::Act(act)}, threads);
        },
        release());
    m.def(
        "sp24_pack",
        [](uintptr_t w, int dtype, int64_t n, int64_t k, int64_t ld, uintptr_t values, uintptr_t meta, int threads) {
            return table().pack({at(w), sk::Dtype(dtype), n, k, ld}, at(values), at<uint8_t>(meta), threads);
        },
        release());
    m.def(
        "sp24_pack_top2",
        [](uintptr_t w, int dtype, int64_t n, int64_t k, int64_t ld, uintptr_t values, uintptr_t meta, int threads) {
            table().pack_top2({at(w), sk::Dtype(dtype), n, k, ld}, at(values), at<uint8_t>(meta), threads);
        },
        release());
    m.def(
        "sp24_unpack",
        [](uintptr_t values, uintptr_t meta, int dtype, int64_t n, int64_t k, uintptr_t dense, int threads) {
            table().unpack(weight(values, meta, dtype, n, k), at(dense), threads);
        },
        release());
    m.def(
        "sp24_columns",
        [](uintptr_t meta, int64_t n, int64_t k, uintptr_t col, int threads) {
            table().columns(at<const uint8_t>(meta), n, k, at<int32_t>(col), threads);
        },
        release());
    m.def(
        "sp24_check", [](uintptr_t meta, int64_t bytes) { return table().check(at<const uint8_t>(meta), bytes); },
        release());
    m.def(
        "dense_gemv_bf16",  // x [tokens, k], w [n, k], y [tokens, n], all contiguous
        [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t tokens, int64_t n, int64_t k, int threads) {
            constexpr sk::Dtype bf16 = sk::Dtype::bf16;
            table().dense_gemv({at(w), bf16, n, k, k}, {at(x), bf16, tokens, k, k}, {at(y), bf16, tokens, n, n},
                               threads);
        },
        release());
}
