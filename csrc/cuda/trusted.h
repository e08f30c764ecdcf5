// Trusted kinds of drawings, all of a call, as their CUDA kernels (trusted.cu) see them: raw pointers and sizes. Small
// enough to be a kernel's parameter.
#pragma once

#include "../host_device.h"
#include "../problem.h"

namespace coarse {

template <class R>
struct TrustedKind {
  const void* labels = nullptr;  // (B, layers, D, H, W)
  int64_t layers = 0;
  const R* transition = nullptr;    // (C, C); null: identity
  const R* class_weight = nullptr;  // (C)
  const R* pixel_weight = nullptr;  // as labels
  const R* scale = nullptr;         // what the kind's sums are multiplied with; null: 1
  R* nll_map = nullptr;             // as labels: w nll; null: not wanted
  R* loss_map = nullptr;            // the same once more
  double* sums = nullptr;           // (kSumRows, 2): sum w nll, and nothing; zeros on arrival, a row for a warp
  double weight = 1;                // of the kind in the loss
  LabelType label_type = LabelType::u8;
};

template <class R>
struct Trusted {
  int64_t batch = 0;
  int size[3] = {1, 1, 1};  // pixels: D, H, W
  int grid[3] = {1, 1, 1};  // of the class logits
  int classes = 0;
  Storage storage = Storage::f32;
  const void* seg_logits = nullptr;  // (B, C, grid)
  void* gradient = nullptr;          // as seg_logits, or in R; null: not wanted
  bool gradient_in_r = false;
  int64_t ignore_index = 255;
  int64_t layers = 0;  // of all kinds
  int kind_count = 0;
  TrustedKind<R> kinds[kMaxKinds];

  // What trusted_pixels leaves for the kernels after it, where anything is left to do (null: nothing is). Of a pixel,
  // (B, D, H, W): the largest logit, and the summed weight of its labels over sum_j exp(s[j] - top).
  R* top = nullptr;
  R* factor = nullptr;
  // Of a label, (layers, B, D, H, W): its weight (0: none, or impossible), over sum_j T[j,y] exp(s[j] - layer_top);
  // layer_top is the largest logit that T[.,y] lets through, not written where T = I.
  R* share = nullptr;
  R* layer_top = nullptr;
  void* label_map = nullptr;  // (B, D, H, W), uint8 up to 256 classes, else int64

  COARSE_HD int64_t pixels() const { return static_cast<int64_t>(size[0]) * size[1] * size[2]; }
  COARSE_HD int64_t points() const { return static_cast<int64_t>(grid[0]) * grid[1] * grid[2]; }
  bool on_pixels() const { return grid[0] == size[0] && grid[1] == size[1] && grid[2] == size[2]; }
};

namespace cuda {

using Error = const char*;

// Layers whose labels trusted_pixels keeps in registers. Where there are more it needs Trusted::share and layer_top for
// the gradient of the class logits.
constexpr int kHeldLayers = 4;

// nll of every label, its sums, its map; the gradient of class logits on the pixel grid; and what the others read.
template <class R>
Error trusted_pixels(const Trusted<R>& t, void* stream);
// The gradient of class logits on a grid of their own.
template <class R>
Error trusted_gather(const Trusted<R>& t, void* stream);
// The gradient of a kind's transition: `slices` of it, (C, C) each, zeros on arrival, to be added up.
template <class R>
int64_t trusted_slices(const Trusted<R>& t);
template <class R>
Error trusted_transition(const Trusted<R>& t, int kind, int64_t slices, double* sums, void* stream);
// The most probable class of each pixel.
template <class R>
Error trusted_labels(const Trusted<R>& t, void* stream);
}  // namespace cuda
}  // namespace coarse
