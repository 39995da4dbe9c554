// sp24's entries of sparsekern._cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../sp24/kernels.cuh"

namespace py = pybind11;
using namespace sk::sp24;

// Images' fields in their order; of a matrix there are none.
static sk::device::Images images_of(const std::vector<int>& fields) {
    if (fields.empty()) return {};
    if (fields.size() != 12) throw std::runtime_error("images have 12 fields");
    const int* f = fields.data();
    return {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11]};
}

void bind_sp24_cuda(py::module_& m) {
    m.def("sp24_kernels", [](int type) {
        py::list all;
        for (const KernelInfo& k : kernels(type)) {
            all.append(py::make_tuple(k.family, k.rows, k.tokens, k.cluster, k.threads, k.shared_bytes, k.partial_words,
                                      k.counters, k.accurate));
        }
        return all;
    });
    m.def("sp24_resident", &resident);
    m.def("sp24_mm", [](int kernel, int type, uint64_t fragments, int n, int k, uint64_t x, int m, int64_t x_stride,
                        uint64_t y, int64_t y_stride, int out_type, uint64_t w_scale, uint64_t x_scale, uint64_t bias,
                        int bias_type, int activation, float alpha, uint64_t residual, int64_t residual_stride,
                        float beta, const std::vector<int>& images, int workers, int streamed, uint64_t partials,
                        uint64_t counters, uint64_t stream) {
        mm({.kernel = kernel,
            .type = type,
            .out_type = out_type,
            .bias_type = bias_type,
            .activation = activation,
            .fragments = fragments,
            .x = x,
            .y = y,
            .w_scale = w_scale,
            .x_scale = x_scale,
            .bias = bias,
            .residual = residual,
            .partials = partials,
            .counters = counters,
            .x_stride = x_stride,
            .y_stride = y_stride,
            .residual_stride = residual_stride,
            .m = m,
            .n = n,
            .k = k,
            .alpha = alpha,
            .beta = beta,
            .images = images_of(images),
            .workers = workers,
            .streamed = streamed,
            .stream = stream});
    });
    m.def("sp24_sddmm", [](int kernel, int type, uint64_t dy, int64_t dy_stride, uint64_t x, int64_t x_stride, int m,
                           uint64_t metadata, int64_t metadata_stride, uint64_t values, int n, int k, int pairs,
                           int workers, int streamed, uint64_t partials, uint64_t counters, uint64_t stream) {
        sddmm({.kernel = kernel,
               .type = type,
               .dy = dy,
               .x = x,
               .metadata = metadata,
               .values = values,
               .partials = partials,
               .counters = counters,
               .dy_stride = dy_stride,
               .x_stride = x_stride,
               .metadata_stride = metadata_stride,
               .m = m,
               .n = n,
               .k = k,
               .pairs = pairs,
               .workers = workers,
               .streamed = streamed,
               .stream = stream});
    });
    m.def("sp24_repack", [](int from, int type, int n, int k, uint64_t dense, int64_t dense_stride, uint64_t mask,
                            int64_t mask_stride, uint64_t values, uint64_t metadata, uint64_t fragments,
                            uint64_t to_fragments, uint64_t to_transposed, uint64_t to_values, uint64_t to_metadata,
                            uint64_t to_dense, int64_t to_dense_stride, uint64_t first, uint64_t stream) {
        repack({.from = from,
                .type = type,
                .n = n,
                .k = k,
                .dense = dense,
                .mask = mask,
                .values = values,
                .metadata = metadata,
                .fragments = fragments,
                .dense_stride = dense_stride,
                .mask_stride = mask_stride,
                .to_fragments = to_fragments,
                .to_transposed = to_transposed,
                .to_values = to_values,
                .to_metadata = to_metadata,
                .to_dense = to_dense,
                .to_dense_stride = to_dense_stride,
                .first = first,
                .stream = stream});
    });
}
