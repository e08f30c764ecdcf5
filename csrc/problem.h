// One call as the kernels see it: raw pointers and sizes, nothing of torch, nothing of one device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "host_device.h"
#include "storage.h"

namespace coarse {

// Kinds of drawings in one call; operator.py refuses more.
constexpr int kMaxKinds = 30;

// Values on a grid of their own: (images, planes, D, H, W); lower ranks have D = 1, or D = H = 1. Contiguous but for
// the first axis. Where the grid is coarser than the pixels they are interpolated linearly.
struct Field {
  const void* data = nullptr;  // null: absent
  void* gradient = nullptr;    // contiguous; null: not wanted
  Storage storage = Storage::f32;
  int64_t images = 0;        // B, or 1: the same for every image
  int64_t image_stride = 0;  // elements; 0 for one that is expanded
  int64_t grid[3] = {1, 1, 1};

  int64_t points() const { return grid[0] * grid[1] * grid[2]; }
};

// A sum of doubles beside what its roundings have left out (Neumaier 1974, ZAMM 54): off by a rounding of the sum and,
// of n terms, n eps^2 of their sizes. Not of inf or NaN, which stay what they are.
struct CompensatedSum {
  double rounded = 0, rest = 0;

  COARSE_HD void add(double x) {
    const double next = rounded + x;
    const double left = __builtin_fabs(rounded) < __builtin_fabs(x) ? (x - next) + rounded : (rounded - next) + x;
    rest += __builtin_fabs(next) <= std::numeric_limits<double>::max() ? left : 0.0;
    rounded = next;
  }
  COARSE_HD void add(const CompensatedSum& other) {
    add(other.rounded);
    rest += other.rest;
  }
  COARSE_HD double total() const { return rounded + rest; }
};

// One kind of drawings. R is float or double, as in `Problem`; an absent tensor is null.
template <class R>
struct Drawings {
  Field field;                   // CM logits, C x C planes; absent: A = I
  const void* labels = nullptr;  // (B, layers, D, H, W)
  LabelType label_type = LabelType::u8;
  int64_t layers = 1;
  const R* transition = nullptr;    // (C, C); null: identity
  const R* class_weight = nullptr;  // (C)
  const R* pixel_weight = nullptr;  // (B, layers, D, H, W)
  R trace_weight = 0;
  R gradient_scale = 1;

  // Gradients are those of gradient_scale * sum w (nll + trace_weight * tr A).
  R* nll_map = nullptr;    // (B, layers, D, H, W): w nll
  R* trace_map = nullptr;  // (B, layers, D, H, W): w tr A
  // One row per task, so that the sums do not depend on the number of threads.
  CompensatedSum* sums = nullptr;         // (tasks, 2): sum w nll, sum w tr A
  double* transition_gradient = nullptr;  // (slices of the tasks, C, C), zeros on arrival; null: not wanted
};

// What is asked of the pixel grid (B, D, H, W).
template <class R>
struct Problem {
  int64_t batch = 0, depth = 1, height = 1, width = 0;
  int classes = 0;
  int64_t ignore_index = 255;
  Field seg;  // class logits, C planes
  const Drawings<R>* kinds = nullptr;
  int kind_count = 0;
  void* posterior = nullptr;  // (B, C, D, H, W) in the storage of `seg`; instead of loss and gradients
  void* label_map = nullptr;  // (B, D, H, W), uint8 or int64: the most probable class; instead of all else
  LabelType label_map_type = LabelType::u8;
  unsigned char* bad_label = nullptr;  // (tasks): set where a label is out of range

  int64_t pixels() const { return depth * height * width; }
};

}  // namespace coarse
