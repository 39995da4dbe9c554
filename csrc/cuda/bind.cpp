// The Python module sparsekern._cuda; the tests build the same units as an emulator (SK_EMULATOR).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#ifdef SK_EMULATOR
#include "../device/twin.h"
#include "engine.h"
#endif

namespace py = pybind11;

void bind_bitmap_cuda(py::module_& m);
void bind_csr_cuda(py::module_& m);
void bind_sp24_cuda(py::module_& m);
void bind_probes(py::module_& m);  // tests/emulator

#ifdef SK_EMULATOR
PYBIND11_MODULE(_emulator, m) {
    m.doc() = "sparsekern's CUDA kernels, emulated";
    m.def("set_schedule", [](const std::string& order, uint64_t seed) {
        const auto o = order == "ascending"    ? emu::Order::ascending
                       : order == "descending" ? emu::Order::descending
                                               : emu::Order::random;
        emu::set_schedule({o, seed});
    });
    m.def("set_fp8_sum_bits", [](int bits) { sk::device::twin::fp8_sum_bits() = bits; });
    bind_probes(m);
#else
PYBIND11_MODULE(_cuda, m) {
    m.doc() = "sparsekern CUDA kernels";
    m.attr("sources") = uint64_t{SK_SOURCES};
    m.attr("archs") = SK_ARCHS;
#endif
    bind_bitmap_cuda(m);
    bind_csr_cuda(m);
    bind_sp24_cuda(m);
}
