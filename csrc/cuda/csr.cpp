// csr's entries of sparsekern._cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../csr/kernels.cuh"

namespace py = pybind11;
using namespace sk::csr;

namespace {

py::list tuples(const std::vector<TileInfo>& tiles) {
    py::list all;
    for (const TileInfo& t : tiles) all.append(py::make_tuple(t.rows_per, t.warps, t.rows, t.tokens, t.shared_bytes));
    return all;
}

// y, y_stride, type, bias, bias_type, activation, x_scale, residual, residual_stride
Out out_of(const std::array<int64_t, 9>& o, float beta) {
    const auto address = [&](int i) { return static_cast<uint64_t>(o[i]); };
    return {.y = address(0),
            .bias = address(3),
            .x_scale = address(6),
            .residual = address(7),
            .y_stride = o[1],
            .residual_stride = o[8],
            .type = static_cast<int>(o[2]),
            .bias_type = static_cast<int>(o[4]),
            .activation = static_cast<int>(o[5]),
            .beta = beta};
}

}  // namespace

void bind_csr_cuda(py::module_& m) {
    m.def("csr_mm_tiles", [](int type) { return tuples(mm_tiles(type)); });
    m.def("csr_sddmm_tiles", [](int type) { return tuples(sddmm_tiles(type)); });
    m.def("csr_conv_tiles", [](int type) {
        py::list all;
        for (const ConvTileInfo& t : conv_tiles(type)) {
            all.append(py::make_tuple(t.rows_per, t.warps, t.rows, t.positions, t.words, t.slice_words));
        }
        return all;
    });
    m.def("csr_slice_columns", &slice_columns);
    m.def("csr_mv_staged_bytes", &mv_staged_bytes);
    m.def("csr_panels", [](int type, uint64_t x, int64_t stride, int m, int columns, uint64_t panels, uint64_t stream) {
        sk::csr::panels({type, x, panels, stream, stride, m, columns});
    });
    m.def("csr_mm",
          [](int kernel, int type, uint64_t values, int64_t nnz, uint64_t offsets, uint64_t starts, uint64_t order,
             uint64_t items, int items_count, int m, int n, int k, uint64_t panels, const std::array<int64_t, 9>& out,
             float beta, uint64_t partials, uint64_t counters, uint64_t stream) {
              mm({.kernel = kernel,
                  .type = type,
                  .values = values,
                  .offsets = offsets,
                  .starts = starts,
                  .order = order,
                  .items = items,
                  .panels = panels,
                  .partials = partials,
                  .counters = counters,
                  .stream = stream,
                  .nnz = nnz,
                  .m = m,
                  .n = n,
                  .k = k,
                  .items_count = items_count,
                  .out = out_of(out, beta)});
          });
    m.def("csr_mv", [](int kernel, int type, uint64_t values, int64_t nnz, uint64_t distances, uint64_t short_columns,
                       uint64_t columns, uint64_t units, int units_count, uint64_t splits, int m, int n, int k,
                       uint64_t x, int64_t x_stride, const std::array<int64_t, 9>& out, float beta, int workers,
                       uint64_t partials, uint64_t counters, uint64_t stream) {
        mv({.kernel = kernel,
            .type = type,
            .values = values,
            .distances = distances,
            .short_columns = short_columns,
            .columns = columns,
            .units = units,
            .splits = splits,
            .x = x,
            .partials = partials,
            .counters = counters,
            .stream = stream,
            .x_stride = x_stride,
            .nnz = nnz,
            .m = m,
            .n = n,
            .k = k,
            .units_count = units_count,
            .workers = workers,
            .out = out_of(out, beta)});
    });
    m.def("csr_sddmm", [](int kernel, int type, uint64_t out, int64_t nnz, uint64_t offsets, uint64_t starts,
                          uint64_t order, int groups, int m, int n, int k, uint64_t x_panels, uint64_t dy_panels,
                          uint64_t sums, int splits, uint64_t stream) {
        sddmm({.kernel = kernel,
               .type = type,
               .offsets = offsets,
               .starts = starts,
               .order = order,
               .x_panels = x_panels,
               .dy_panels = dy_panels,
               .sums = sums,
               .out = out,
               .stream = stream,
               .nnz = nnz,
               .m = m,
               .n = n,
               .k = k,
               .groups = groups,
               .splits = splits});
    });
    m.def("csr_planes",
          [](int type, uint64_t x, const std::array<int64_t, 8>& image, uint64_t planes_at, int64_t plane_words,
             uint64_t sheets, int sheets_count, const std::array<int, 6>& grid, uint64_t stream) {
              planes({.type = type,
                      .x = x,
                      .planes = planes_at,
                      .sheets = sheets,
                      .stream = stream,
                      .sheets_count = sheets_count,
                      .image = image,
                      .grid = grid,
                      .plane_words = plane_words});
          });
    m.def("csr_conv",
          [](int kernel, int type, uint64_t values, int64_t nnz, uint64_t offsets, uint64_t starts, uint64_t order,
             uint64_t items, int items_count, const std::array<int, 8>& walk, uint64_t planes_at, uint64_t pieces,
             uint64_t maps, const std::array<int, 7>& tiling, const std::array<int64_t, 6>& memory, uint64_t y,
             uint64_t bias, int bias_type, int activation, uint64_t partials, uint64_t counters, uint64_t stream) {
              conv({.kernel = kernel,
                    .type = type,
                    .values = values,
                    .offsets = offsets,
                    .starts = starts,
                    .order = order,
                    .items = items,
                    .planes = planes_at,
                    .pieces = pieces,
                    .maps = maps,
                    .y = y,
                    .bias = bias,
                    .partials = partials,
                    .counters = counters,
                    .stream = stream,
                    .nnz = nnz,
                    .items_count = items_count,
                    .bias_type = bias_type,
                    .activation = activation,
                    .memory = memory,
                    .tiling = tiling,
                    .walk = walk});
          });
}
