// The kernels of one instruction set, as a table. Included last by each kernels_*.cpp.
#pragma once

#include "task.h"

namespace coarse {
namespace {

LabelScan scan_labels(const void* labels, LabelType type, int64_t n, int64_t ignore_index, int64_t classes) {
  int64_t counted = 0, bad = 0;
  const auto scan = [&](const auto* y) {
    for (int64_t k = 0; k < n; ++k) {
      const int64_t label = y[k];
      const bool used = label != ignore_index;
      counted += used;
      bad += used & ((label < 0) | (label >= classes));
    }
    counted -= bad;
    if (bad == 0) return int64_t{0};
    for (int64_t k = 0; k < n; ++k) {
      const int64_t label = y[k];
      if (label != ignore_index && (label < 0 || label >= classes)) return label;
    }
    return int64_t{0};
  };
  const int64_t first =
      type == LabelType::u8 ? scan(static_cast<const uint8_t*>(labels)) : scan(static_cast<const int64_t*>(labels));
  return {static_cast<double>(counted), bad != 0, first};
}

template <class F>
void map_array(const float* x, float* y, int64_t n, F f) {
  constexpr int64_t N = kLanes<float>;
  int64_t k = 0;
  for (; k + N <= n; k += N) store(y + k, f(load(x + k)));
  if (k == n) return;
  float rest[N] = {};
  memcpy(rest, x + k, sizeof(float) * static_cast<size_t>(n - k));
  store(rest, f(load(rest)));
  memcpy(y + k, rest, sizeof(float) * static_cast<size_t>(n - k));
}

void exp_array(const float* x, float* y, int64_t n) {
  constexpr int64_t N = kLanes<float>, together = kBlock * N;
  int64_t k = 0;
  for (; k + together <= n; k += together) {
    VecF v[kBlock];
    for (int b = 0; b < kBlock; ++b) v[b] = load(x + k + b * N);
    exp_each<kBlock>(v);
    for (int b = 0; b < kBlock; ++b) store(y + k + b * N, v[b]);
  }
  map_array(x + k, y + k, n - k, [](VecF v) { return exp_v(v); });
}

void log_array(const float* x, float* y, int64_t n) {
  map_array(x, y, n, [](VecF v) { return log_v(v); });
}

// Copies n floats past the caches (n a multiple of the lanes, dst aligned): the machine's ceiling for read + write.
void stream_copy(const float* src, float* dst, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<float>) stream(dst + k, load(src + k));
  stream_fence();
}

// Sum of n floats (n a multiple of 8 vectors), of any rounding: the machine's limit for reading. One sum would be bound
// by the latency of its additions.
float sum_array(const float* x, int64_t n) {
  constexpr int64_t N = kLanes<float>;
  constexpr int kSums = 8;
  VecF sums[kSums] = {};
  for (int64_t k = 0; k < n; k += kSums * N) {
    for (int j = 0; j < kSums; ++j) sums[j] += load(x + k + j * N);
  }
  for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
  return static_cast<float>(sum_lanes<float>(sums[0]));
}

// x = x / 2 + 1, `rounds` times, on kFmaChains vectors: the machine's limit for arithmetic. Nothing overflows, and
// nothing becomes subnormal: x goes to 2.
void fma_chains(float* x, int64_t rounds) {
  constexpr int64_t N = kLanes<float>;
  const VecF half = broadcast<VecF>(0.5f), one = broadcast<VecF>(1.0f);
  VecF chains[kFmaChains];
  for (int j = 0; j < kFmaChains; ++j) chains[j] = load(x + j * N);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int j = 0; j < kFmaChains; ++j) chains[j] = chains[j] * half + one;
  }
  for (int j = 0; j < kFmaChains; ++j) store(x + j * N, chains[j]);
}

void convert(const float* src, void* dst, Storage storage, int64_t n) { store_run(dst, storage, 0, n, src); }

template <class R>
constexpr KernelSet<R> kernel_set() {
  return {task_workspace<R>, run_task<R>};
}

constexpr Kernels make_kernels(const char* isa) {
  return {isa,       COARSE_SIMD_BYTES, kernel_set<float>(), scan_labels, exp_array,
          log_array, stream_copy,       sum_array,           fma_chains,  convert};
}

}  // namespace
}  // namespace coarse
