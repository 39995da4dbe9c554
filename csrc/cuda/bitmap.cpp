// bitmap's entries of sparsekern._cuda.
#include <pybind11/pybind11.h>

#include "../bitmap/kernels.cuh"

namespace py = pybind11;
using namespace sk::bitmap;

void bind_bitmap_cuda(py::module_& m) {
    m.def("bitmap_kernels", [](int type) {
        py::list all;
        for (const KernelInfo& k : kernels(type)) {
            all.append(py::make_tuple(k.order, k.rows, k.tokens, k.blocks, k.least, k.shared_bytes, k.shared_more));
        }
        return all;
    });
    m.def("bitmap_mm",
          [](int kernel, int type, uint64_t records, uint64_t offsets, int longest, int n, int k, uint64_t x, int m,
             int64_t x_stride, uint64_t y, int64_t y_stride, int out_type, uint64_t x_scale, uint64_t bias,
             int bias_type, int activation, uint64_t residual, int64_t residual_stride, float beta, int workers,
             uint64_t partials, uint64_t counters, uint64_t stream) {
              mm({.kernel = kernel,
                  .type = type,
                  .records = records,
                  .offsets = offsets,
                  .x = x,
                  .y = y,
                  .x_scale = x_scale,
                  .bias = bias,
                  .residual = residual,
                  .partials = partials,
                  .counters = counters,
                  .stream = stream,
                  .x_stride = x_stride,
                  .y_stride = y_stride,
                  .residual_stride = residual_stride,
                  .m = m,
                  .n = n,
                  .k = k,
                  .longest = longest,
                  .out_type = out_type,
                  .bias_type = bias_type,
                  .activation = activation,
                  .workers = workers,
                  .beta = beta});
          });
    m.def("bitmap_to_dense",
          [](int type, uint64_t values, uint64_t bits, uint64_t offsets, int n, int k, uint64_t dense,
             uint64_t stream) { to_dense({type, values, bits, offsets, dense, stream, n, k}); });
    m.def("bitmap_from_dense",
          [](int type, uint64_t values, uint64_t bits, uint64_t offsets, int n, int k, uint64_t dense,
             uint64_t stream) { from_dense({type, values, bits, offsets, dense, stream, n, k}); });
}
