// Kernels for avx512, in a file that the compiler's default flags can build: the pragma raises the instruction set for
// what follows. System headers come before it, so that their inline functions are not compiled for avx512 and then
// picked by the linker for everybody.
#if defined(__x86_64__)
#define COARSE_SIMD_BYTES 64

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "kernel_set.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "kernels.h"

namespace coarse {
extern const Kernels kKernelsAvx512 = make_kernels("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
