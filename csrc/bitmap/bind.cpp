#include <pybind11/pybind11.h>

#include "host.h"

namespace py = pybind11;

void bind_bitmap(py::module_& m) { (void)m; }
