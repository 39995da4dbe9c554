// Python entries of the bitmap host kernels; pointers and sizes as integers, see host.h for their meaning.
#include <pybind11/pybind11.h>

#include "host.h"

namespace py = pybind11;

namespace {

const sk::BitmapKernels& table() { SK_RETURN_ACTIVE_TABLE(bitmap_kernels) }

template <class T = void>
T* at(uintptr_t p) {
    return reinterpret_cast<T*>(p);
}

sk::Bitmap weight(uintptr_t values, uintptr_t bits, uintptr_t offsets, int dtype, int64_t n, int64_t k) {
    return {at(values), at<const uint8_t>(bits), at<const int64_t>(offsets), sk::Dtype(dtype), n, k};
}

}  // namespace

void bind_bitmap(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def(
        "bitmap_mm",
        [](uintptr_t values, uintptr_t bits, uintptr_t offsets, int dtype, int64_t n, int64_t k, uintptr_t x,
           int64_t tokens, int64_t ldx, uintptr_t y, int y_dtype, int64_t ldy, uintptr_t bias, int bias_dtype, int act,
           int threads) {
            table().mm(weight(values, bits, offsets, dtype, n, k), {at(x), sk::Dtype(dtype), tokens, k, ldx},
                       {at(y), sk::Dtype(y_dtype), tokens, n, ldy},
                       {nullptr, at(bias), sk::Dtype(bias_dtype), sk::Act(act)}, threads);
        },
        release());
    m.def(
        "bitmap_count",
        [](uintptr_t w, int dtype, int64_t n, int64_t k, int64_t ld, uintptr_t bits, uintptr_t offsets, int threads) {
            table().count({at(w), sk::Dtype(dtype), n, k, ld}, at<uint8_t>(bits), at<int64_t>(offsets), threads);
        },
        release());
    m.def(
        "bitmap_fill",
        [](uintptr_t w, int dtype, int64_t n, int64_t k, int64_t ld, uintptr_t bits, uintptr_t offsets,
           uintptr_t values, int threads) {
            table().fill({at(w), sk::Dtype(dtype), n, k, ld}, at<const uint8_t>(bits), at<const int64_t>(offsets),
                         at(values), threads);
        },
        release());
    m.def(
        "bitmap_unpack",
        [](uintptr_t values, uintptr_t bits, uintptr_t offsets, int dtype, int64_t n, int64_t k, uintptr_t dense,
           int threads) { table().unpack(weight(values, bits, offsets, dtype, n, k), at(dense), threads); },
        release());
    m.def(
        "bitmap_columns",
        [](uintptr_t bits, uintptr_t offsets, int64_t n, int64_t k, uintptr_t col, int threads) {
            table().columns(at<const uint8_t>(bits), at<const int64_t>(offsets), n, k, at<int32_t>(col), threads);
        },
        release());
}
