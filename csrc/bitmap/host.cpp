// The bitmap kernels for one instruction set (see core/isa.h).
#include "host.h"

#include "../core/vec.h"
