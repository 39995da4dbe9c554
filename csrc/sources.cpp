// What this module was built from: setup.py compiles the digest in (sparsekern/_sources.py), Python compares it.
#include <cstdint>

namespace sk {
extern const uint64_t kSources;
const uint64_t kSources = SK_SOURCES;
}  // namespace sk
