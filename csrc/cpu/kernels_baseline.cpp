// Any machine: 16-byte vectors (SSE2 on x86-64, NEON on ARM), no instruction set beyond the compiler's default.
#define COARSE_SIMD_BYTES 16

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "kernels.h"

namespace coarse {
extern const Kernels kKernelsBaseline = make_kernels("baseline");
extern const KernelSet<double> kKernelsDouble = kernel_set<double>();
}  // namespace coarse
