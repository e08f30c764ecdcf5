// Functions that run on the CPU and, under nvcc, on the GPU too.
#pragma once

#if defined(__CUDACC__)  // nvcc needs --expt-relaxed-constexpr, for numeric_limits
#define COARSE_HD __host__ __device__ __forceinline__
#define COARSE_INLINE_LAMBDA
#else
#define COARSE_INLINE_LAMBDA __attribute__((always_inline))
#define COARSE_HD inline __attribute__((always_inline))
#endif
