#include <pybind11/pybind11.h>
void bind_bitmap_cuda(pybind11::module_&) {}
