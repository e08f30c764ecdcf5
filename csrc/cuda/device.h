// What the kernels ask of the machine: launches, shared memory, storage types in and out. Without nvcc the same names
// come from an emulator (tests/cuda_emulation), so that the kernels' own source runs, and is tested, on a CPU.
#pragma once

#include "../coarse_math.h"
#include "../half.h"
#include "layer.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulated_cuda.h"
#endif

namespace coarse {
namespace {

// Kernel parameters that functions may take a reference to, without a copy on the stack.
#if !defined(__CUDACC__)
#define __grid_constant__
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- launches --------------------------------------------------------------------------------------------------------

// Null, or what went wrong.
using Error = const char*;

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char coarse_dynamic_shared[];
  return coarse_dynamic_shared;
}

inline Error text(cudaError_t code) { return code == cudaSuccess ? nullptr : cudaGetErrorString(code); }

// More than 48 KB of dynamic shared memory has to be asked for, once per kernel and device.
template <class Kernel>
Error allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return nullptr;
  const auto code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (code == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch, whoever's, would be told
  return "so many classes need more shared memory than a block may have on this device";
}

// Blocks that run at the same time: what a grid has whose blocks loop over their work. None of these calls waits.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared_bytes) {
  int device = 0, multiprocessors = 1, each = 1;
  if (allow_shared(kernel, shared_bytes) != nullptr) return 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
  return static_cast<int64_t>(multiprocessors) * (each > 0 ? each : 1);
}

template <class... P, class... A>
Error launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void* stream, const A&... args) {
  if (blocks == 0) return nullptr;
  if (Error error = allow_shared(kernel, shared_bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return text(cudaGetLastError());
}

#else

inline unsigned char* dynamic_shared() { return emulated::shared_memory(); }

template <class Kernel>
int64_t resident_blocks(Kernel, int, size_t) {
  return 3;  // so that blocks loop
}

template <class... P, class... A>
Error launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void*, const A&... args) {
  emulated::run_grid(static_cast<unsigned>(blocks), threads, shared_bytes, [&] { kernel(args...); });
  return nullptr;
}

#endif

// f(ClassBound) for the number of classes, if it is one that the fast kernels serve: between the two bounds, or from
// kExactFrom on, where registers are full, both that very number. Loops over classes are unrolled to `most`; only from
// `least` on they have to ask (`beyond`). COARSE_EXACT_CLASSES builds a kernel for every number, to be timed against.
constexpr int kMaxFastClasses = 21;
template <int kLeast, int kMost>
struct ClassBound {
  static constexpr int least = kLeast, most = kMost;
};
template <int kLast, int kExactFrom, int kLeast, int kMost, class F>
bool with_bound_from(int classes, const F& f) {
  if constexpr (kMost > kLast) {
    return false;
  } else {
    constexpr bool kExact = kMost >= kExactFrom;
    constexpr int kWider = kMost < 16 ? kMost + 4 : kMost < 19 ? 19 : kMost < kLast ? kLast : kLast + 1;
    constexpr int kNext = kExact || kWider > kExactFrom ? kMost + 1 : kWider;
    if (kExact ? classes != kMost : classes > kMost)
      return with_bound_from<kLast, kExactFrom, kMost + 1, kNext>(classes, f);
    f(ClassBound<kExact ? kMost : kLeast, kMost>{});
    return true;
  }
}
template <int kLast, int kExactFrom = kLast + 1, class F>
bool with_class_bound(int classes, const F& f) {
#if defined(COARSE_EXACT_CLASSES)
  return with_bound_from<kLast, 2, 2, 2>(classes, f);
#else
  return classes >= 2 && with_bound_from<kLast, kExactFrom, 2, 4>(classes, f);
#endif
}

// Of an index that the compiler knows: whether there is no such class.
template <int kLeast>
COARSE_HD bool beyond(int i, int classes) {
  return i >= kLeast && i >= classes;
}

// --- storage ---------------------------------------------------------------------------------------------------------

template <Storage kStorage>
struct StorageOf;
template <>
struct StorageOf<Storage::f32> {
  using Type = float;
};
template <>
struct StorageOf<Storage::f64> {
  using Type = double;
};
template <>
struct StorageOf<Storage::bf16> {
  using Type = uint16_t;
};
template <>
struct StorageOf<Storage::f16> {
  using Type = uint16_t;
};

template <Storage kStorage, class R>
__device__ __forceinline__ R decode(typename StorageOf<kStorage>::Type x) {
  if constexpr (kStorage == Storage::bf16) {
    return static_cast<R>(bfloat16_to_float(x));
  } else if constexpr (kStorage == Storage::f16) {
    return static_cast<R>(half_to_float(x));
  } else {
    return static_cast<R>(x);
  }
}

template <Storage kStorage, class R>
__device__ __forceinline__ typename StorageOf<kStorage>::Type encode(R x) {
  if constexpr (kStorage == Storage::bf16) {
    return float_to_bfloat16(static_cast<float>(x));
  } else if constexpr (kStorage == Storage::f16) {
    return float_to_half(static_cast<float>(x));
  } else {
    return static_cast<typename StorageOf<kStorage>::Type>(x);
  }
}

template <Storage kStorage>
struct Stored {
  static constexpr Storage value = kStorage;
};
// f(Stored): one branch where a kernel reads many, and the compiler has to know what.
template <class F>
__device__ __forceinline__ void read_as_stored(Storage storage, const F& f) {
  switch (storage) {
    case Storage::bf16: f(Stored<Storage::bf16>{}); break;
    case Storage::f16: f(Stored<Storage::f16>{}); break;
    default: f(Stored<Storage::f32>{});
  }
}

// What no thread of the launch writes: the compiler may move the load across stores.
template <class T>
__device__ __forceinline__ T read_only(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldg(p);
#else
  return *p;
#endif
}

// Brings what lies at p into the first-level cache, for loads to come. A load whose result nobody reads: nothing waits.
__device__ __forceinline__ void touch(const void* p) {
#if defined(__CUDA_ARCH__)
  [[maybe_unused]] unsigned unread;
  asm volatile("ld.global.ca.u8 %0, [%1];" : "=r"(unread) : "l"(p));
#else
  static_cast<void>(p);
#endif
}

// Where the storage is known at run time only: a branch that every thread takes alike.
template <class R>
__device__ __forceinline__ R load_as(const void* p, Storage storage, int64_t at) {
  if constexpr (sizeof(R) == 8) return static_cast<const double*>(p)[at];
  switch (storage) {
    case Storage::bf16: return decode<Storage::bf16, R>(static_cast<const uint16_t*>(p)[at]);
    case Storage::f16: return decode<Storage::f16, R>(static_cast<const uint16_t*>(p)[at]);
    default: return static_cast<R>(static_cast<const float*>(p)[at]);
  }
}

template <class R>
__device__ __forceinline__ void store_as(void* p, Storage storage, int64_t at, R x) {
  if constexpr (sizeof(R) == 8) {
    static_cast<double*>(p)[at] = x;
  } else {
    switch (storage) {
      case Storage::bf16: static_cast<uint16_t*>(p)[at] = encode<Storage::bf16>(x); break;
      case Storage::f16: static_cast<uint16_t*>(p)[at] = encode<Storage::f16>(x); break;
      default: static_cast<float*>(p)[at] = x;
    }
  }
}

// --- labels ----------------------------------------------------------------------------------------------------------

// Where image and pixel are in labels, weights and maps.
template <class R>
__device__ __forceinline__ int64_t map_at(const Layer<R>& s, int64_t image, int64_t pixel) {
  return image * s.map_stride + pixel;
}

// The label at `at`, or -1 where there is none: ignored, or out of range, which must not become an address.
__device__ __forceinline__ int valid_label(const void* labels, LabelType type, int64_t at, int64_t ignore_index,
                                           int classes) {
  const int64_t y =
      type == LabelType::u8 ? static_cast<const uint8_t*>(labels)[at] : static_cast<const int64_t*>(labels)[at];
  return y == ignore_index || y < 0 || y >= classes ? -1 : static_cast<int>(y);
}

template <class R>
__device__ __forceinline__ int label_at(const Layer<R>& s, int64_t at) {
  return valid_label(s.labels, s.label_type, at, s.ignore_index, s.classes);
}

// class_weight[label] * pixel_weight of a labelled pixel.
template <class R>
__device__ __forceinline__ R weight_at(const Layer<R>& s, int label, int64_t at) {
  R weight = s.class_weight != nullptr ? s.class_weight[label] : R(1);
  if (s.pixel_weight != nullptr) weight *= s.pixel_weight[at];
  return weight;
}

template <class R>
__device__ __forceinline__ R gradient_scale(const Layer<R>& s) {
  const double factor = s.scale != nullptr ? static_cast<double>(*s.scale) : 1.0;
  return static_cast<R>(factor * static_cast<double>(s.weight));
}

// The same number, but the compiler does not know: what is made of it is made again, not kept in registers meanwhile.
__device__ __forceinline__ int again(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// --- gradients -------------------------------------------------------------------------------------------------------

// What a launch has for an entry of a gradient. Where there is something to add it to, that is in R.
template <class R>
__device__ __forceinline__ void put(void* p, Storage storage, bool add, int64_t at, R x) {
  if (add) {
    static_cast<R*>(p)[at] += x;
  } else {
    store_as(p, storage, at, x);
  }
}

// --- sums ------------------------------------------------------------------------------------------------------------

template <class X>
__device__ __forceinline__ X warp_sum(X x) {  // the same on every lane, in the same order
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Weighted loss terms of the pixels that a thread has seen.
struct Terms {
  double nll = 0, trace = 0;
};

template <class R>
__device__ __forceinline__ void write_maps(const Layer<R>& s, int64_t at, R nll, R trace) {
  s.nll_map[at] = nll;
  s.trace_map[at] = trace;
  s.loss_map[at] = nll + s.trace_weight * trace;
}

// One pixel: its maps, and its share of the sums. A weight of 0 counts for nothing, whatever nll is.
template <class R>
__device__ __forceinline__ void add_pixel(const Layer<R>& s, int64_t at, R weight, R nll, R trace, Terms& terms) {
  nll = weight == R(0) ? R(0) : weight * nll;
  trace = weight == R(0) ? R(0) : weight * trace;
  terms.nll += static_cast<double>(nll);
  terms.trace += static_cast<double>(trace);
  if (s.nll_map != nullptr) write_maps(s, at, nll, trace);
}

// Called by whole warps; `row` of s.sums belongs to this warp alone, launch after launch.
template <class R>
__device__ __forceinline__ void leave_sums(const Layer<R>& s, int64_t row, const Terms& terms) {
  const double nll = warp_sum(terms.nll), trace = warp_sum(terms.trace);
  if (threadIdx.x % kWarp == 0) {
    s.sums[2 * row] += nll;
    s.sums[2 * row + 1] += trace;
  }
}

}  // namespace
}  // namespace coarse
