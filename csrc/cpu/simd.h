// Vectors of COARSE_SIMD_BYTES bytes (GCC/Clang vector extensions), one pixel per lane. Included by one translation
// unit per instruction set, after its target pragma, hence the anonymous namespace (see coarse_math.h).
#pragma once

#ifndef COARSE_SIMD_BYTES
#error "define COARSE_SIMD_BYTES before including cpu/simd.h"
#endif

#include "../coarse_math.h"
#include "../half.h"
#include "kernel_set.h"

namespace coarse {
namespace {

typedef float VecF __attribute__((vector_size(COARSE_SIMD_BYTES)));
typedef double VecD __attribute__((vector_size(COARSE_SIMD_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(COARSE_SIMD_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(COARSE_SIMD_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(COARSE_SIMD_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(COARSE_SIMD_BYTES)));

template <>
struct Lanes<VecF> {
  using Scalar = float;
  using Int = VecI32;
  using UInt = VecU32;
};
template <>
struct Lanes<VecD> {
  using Scalar = double;
  using Int = VecI64;
  using UInt = VecU64;
};

template <class R>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <class R>
using Vec = typename VecOf<R>::type;
template <class R>
constexpr int kLanes = COARSE_SIMD_BYTES / static_cast<int>(sizeof(R));

// Vectors that go through a long chain of operations together (`exp_each`): as many as fill both units while each
// waits, or as registers there are.
constexpr int kBlock = 4;

template <int kCount>
struct Block {
  static constexpr int value = kCount;
};
// f(Block<n>{}, k) for items [k, k + n) of `count`: kCount at a time, and the rest by halves.
template <int kCount, class F>
COARSE_HD void in_blocks(int count, const F& f, int from = 0) {
  int k = from;
  for (; k + kCount <= count; k += kCount) f(Block<kCount>{}, k);
  if constexpr (kCount > 1) in_blocks<kCount / 2>(count, f, k);
}

#if defined(__x86_64__) && COARSE_SIMD_BYTES == 64
template <>
struct PowerOfTwo<VecF> {
  static COARSE_HD VecF scale(VecF y, VecF t, VecF magic) { return _mm512_scalef_ps(y, t - magic); }
};
#endif

// 1 / x for x in [1e-30, 1e30], to one unit in the last place: a division takes 16 cycles.
template <class V>
COARSE_HD V quick_inverse(V x) {
#if defined(__x86_64__) && COARSE_SIMD_BYTES == 64
  if constexpr (sizeof(typename Lanes<V>::Scalar) == sizeof(float)) {
    const V y = _mm512_rcp14_ps(x);
    return y + y * (1.0f - x * y);
  }
#endif
  using R = typename Lanes<V>::Scalar;
  return R(1) / x;
}

// Unaligned. Through a vector type rather than memcpy, whose stores might change anything, members of `this` included,
// and have them reloaded in every iteration.
typedef VecF UnalignedF __attribute__((aligned(sizeof(float))));
typedef VecD UnalignedD __attribute__((aligned(sizeof(double))));

COARSE_HD VecF load(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
COARSE_HD VecD load(const double* p) { return *reinterpret_cast<const UnalignedD*>(p); }
COARSE_HD void store(float* p, VecF v) { *reinterpret_cast<UnalignedF*>(p) = v; }
COARSE_HD void store(double* p, VecD v) { *reinterpret_cast<UnalignedD*>(p) = v; }

// Past the caches, for whole lines that nobody reads soon. `p` aligned to the vector.
template <class R>
COARSE_HD void stream(R* p, Vec<R> v) {
#if defined(__x86_64__) && COARSE_SIMD_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#elif defined(__x86_64__) && COARSE_SIMD_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#elif defined(__x86_64__) && COARSE_SIMD_BYTES == 16
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
#else
  store(p, v);
#endif
}

COARSE_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class I>
COARSE_HD bool any(I mask) {
#if defined(__x86_64__) && COARSE_SIMD_BYTES == 64
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__x86_64__) && COARSE_SIMD_BYTES == 32
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  int64_t half[COARSE_SIMD_BYTES / 8], all = 0;
  memcpy(half, &mask, sizeof(half));
  for (int64_t h : half) all |= h;
  return all != 0;
#endif
}

template <class R>
COARSE_HD double sum_lanes(Vec<R> v) {
  double total = 0;
  for (int k = 0; k < kLanes<R>; ++k) total += static_cast<double>(v[k]);
  return total;
}

// Lane k of the result: lane index[k] of the 2 N values (low, high). One instruction on AVX-512.
template <class R>
COARSE_HD Vec<R> permute(Vec<R> low, Vec<R> high, typename Lanes<Vec<R>>::Int index) {
#if defined(__clang__)
  R both[2 * kLanes<R>];
  store(both, low);
  store(both + kLanes<R>, high);
  Vec<R> v;
  for (int k = 0; k < kLanes<R>; ++k) v[k] = both[index[k]];
  return v;
#else
  return __builtin_shuffle(low, high, index);
#endif
}

// The same of N values.
template <class R>
COARSE_HD Vec<R> permute_one(Vec<R> x, typename Lanes<Vec<R>>::Int index) {
#if defined(__clang__)
  return permute<R>(x, x, index);
#else
  return __builtin_shuffle(x, index);
#endif
}

// Of pairs of runs of kHalf lanes, a step of `transpose`: the first run of each pair, a's and b's in turn, or the
// second.
template <int kHalf, bool kSecond, class V, int... kLane>
COARSE_HD V pick_runs(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int N = sizeof...(kLane), shift = kSecond ? kHalf : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? N + kLane - kHalf + shift : kLane + shift)...);
#else
  using I = typename Lanes<V>::Int;
  return __builtin_shuffle(a, b, I{((kLane & kHalf) != 0 ? N + kLane - kHalf + shift : kLane + shift)...});
#endif
}

// Lane k of vector i <-> lane i of vector k, of N vectors.
template <class R, int kHalf = kLanes<R> / 2>
COARSE_HD void transpose(Vec<R>* x) {
  if constexpr (kHalf > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<R>>{};
    for (int i = 0; i < kLanes<R>; ++i) {
      if ((i & kHalf) != 0) continue;
      const Vec<R> a = x[i], b = x[i + kHalf];
      x[i] = pick_runs<kHalf, false>(a, b, lanes);
      x[i + kHalf] = pick_runs<kHalf, true>(a, b, lanes);
    }
    transpose<R, kHalf / 2>(x);
  }
}

// --- storage types ---------------------------------------------------------------------------------------------------

typedef uint16_t VecU16 __attribute__((vector_size(COARSE_SIMD_BYTES / 2)));
COARSE_HD VecF load_bfloat16(const uint16_t* p) {
  VecU16 x;
  memcpy(&x, p, sizeof(x));
  return bit_cast<VecF>(__builtin_convertvector(x, VecU32) << 16);
}
// In the upper half of each lane, as float_to_bfloat16.
COARSE_HD VecU32 round_to_bfloat16(VecF v) {
  const VecU32 u = bit_cast<VecU32>(v);
  return v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
}
COARSE_HD void store_bfloat16(uint16_t* p, VecF v) {
  const VecU16 x = __builtin_convertvector(round_to_bfloat16(v) >> 16, VecU16);
  memcpy(p, &x, sizeof(x));
}

// The upper halves of the lanes of a, and then of b.
typedef uint16_t VecHalves __attribute__((vector_size(COARSE_SIMD_BYTES)));
template <uint16_t... kLane>
COARSE_HD VecHalves upper_halves(VecHalves a, VecHalves b, std::integer_sequence<uint16_t, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * kLane + 1)...);
#else
  return __builtin_shuffle(a, b, VecHalves{static_cast<uint16_t>(2 * kLane + 1)...});
#endif
}
// Two vectors in the bits of one.
COARSE_HD VecF pack_bfloat16(VecF low, VecF high) {
  constexpr auto lanes = std::make_integer_sequence<uint16_t, COARSE_SIMD_BYTES / 2>{};
  return bit_cast<VecF>(
      upper_halves(bit_cast<VecHalves>(round_to_bfloat16(low)), bit_cast<VecHalves>(round_to_bfloat16(high)), lanes));
}

// dst[0..n) = src[0..n), from or to a storage type.
template <class R>
inline void load_run(const void* src, Storage storage, int64_t offset, int64_t n, R* dst) {
  switch (storage) {
    case Storage::f32: {
      const float* p = static_cast<const float*>(src) + offset;
      for (int64_t k = 0; k < n; ++k) dst[k] = static_cast<R>(p[k]);
      break;
    }
    case Storage::f64: {
      const double* p = static_cast<const double*>(src) + offset;
      for (int64_t k = 0; k < n; ++k) dst[k] = static_cast<R>(p[k]);
      break;
    }
    case Storage::bf16: {
      const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
      int64_t k = 0;
      if constexpr (sizeof(R) == 4) {
        for (; k + kLanes<float> <= n; k += kLanes<float>) store(dst + k, load_bfloat16(p + k));
      }
      for (; k < n; ++k) dst[k] = static_cast<R>(bfloat16_to_float(p[k]));
      break;
    }
    case Storage::f16: {
      const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
      int64_t k = 0;
#if defined(__x86_64__) && COARSE_SIMD_BYTES >= 32
      if constexpr (sizeof(R) == 4) {
        for (; k + 8 <= n; k += 8) {
          _mm256_storeu_ps(dst + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k))));
        }
      }
#endif
      for (; k < n; ++k) dst[k] = static_cast<R>(half_to_float(p[k]));
      break;
    }
  }
}

template <class R>
inline void store_run(void* dst, Storage storage, int64_t offset, int64_t n, const R* src) {
  switch (storage) {
    case Storage::f32: {
      float* p = static_cast<float*>(dst) + offset;
      for (int64_t k = 0; k < n; ++k) p[k] = static_cast<float>(src[k]);
      break;
    }
    case Storage::f64: {
      double* p = static_cast<double*>(dst) + offset;
      for (int64_t k = 0; k < n; ++k) p[k] = static_cast<double>(src[k]);
      break;
    }
    case Storage::bf16: {
      uint16_t* p = static_cast<uint16_t*>(dst) + offset;
      int64_t k = 0;
      if constexpr (sizeof(R) == 4) {
        for (; k + kLanes<float> <= n; k += kLanes<float>) store_bfloat16(p + k, load(src + k));
      }
      for (; k < n; ++k) p[k] = float_to_bfloat16(static_cast<float>(src[k]));
      break;
    }
    case Storage::f16: {
      uint16_t* p = static_cast<uint16_t*>(dst) + offset;
      int64_t k = 0;
#if defined(__x86_64__) && COARSE_SIMD_BYTES >= 32
      if constexpr (sizeof(R) == 4) {
        for (; k + 8 <= n; k += 8) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k), _mm256_cvtps_ph(_mm256_loadu_ps(src + k), 0));
        }
      }
#endif
      for (; k < n; ++k) p[k] = float_to_half(static_cast<float>(src[k]));
      break;
    }
  }
}

}  // namespace
}  // namespace coarse
