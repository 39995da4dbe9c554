// The Python module sparsekern._host: one m.def per entry, pointers and sizes as integers. No torch header.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace sk {
extern const uint64_t kSources;
}

void bind_csr(py::module_& m);
void bind_conv(py::module_& m);
void bind_bsr(py::module_& m);
void bind_sp24(py::module_& m);
void bind_bitmap(py::module_& m);

PYBIND11_MODULE(_host, m) {
    m.doc() = "sparsekern host kernels";
    m.attr("sources") = sk::kSources;
    m.def("active_isa", [] { return sk::kIsaNames[static_cast<int>(sk::active_isa())]; });
    m.def("built_isas", [] {
        py::list names;
        for (int i = 0; i < sk::kIsaCount; ++i)
            if (SK_BUILT_ISAS >> i & 1) names.append(sk::kIsaNames[i]);
        return names;
    });
    m.def("supported_isas", [] {
        py::list names;
        for (int i = 0; i < sk::kIsaCount; ++i)
            if (sk::isa_supported(sk::Isa(i))) names.append(sk::kIsaNames[i]);
        return names;
    });
    m.def("set_active_isa", [](const std::string& name) {
        for (int i = 0; i < sk::kIsaCount; ++i)
            if (name == sk::kIsaNames[i]) return sk::set_active_isa(sk::Isa(i));
        throw py::value_error("unknown instruction set '" + name + "'");
    });
    m.def("share_threads", [](uintptr_t entry) { sk::share_threads(reinterpret_cast<sk::OpenMp>(entry)); });
    bind_csr(m);
    bind_conv(m);
    bind_bsr(m);
    bind_sp24(m);
    bind_bitmap(m);
}
