// Entries of the csr host kernels: argument structs and the table that each instruction set fills in.
#pragma once
#include "../core/isa.h"
#include "../core/types.h"
