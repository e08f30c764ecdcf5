// One kind of drawings with a matrix, as the CUDA kernels see it: raw pointers and sizes, nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../host_device.h"
#include "../storage.h"

namespace coarse {

// One annotation stream on the pixel grid (B, D, H, W); lower ranks have D = 1, or D = H = 1. R is float or double.
// Layouts are contiguous; an absent tensor is null.
template <class R>
struct Stream {
  int64_t batch = 0, depth = 1, height = 1, width = 0;
  int classes = 0;
  const void* seg_logits = nullptr;  // (B, C, D, H, W)
  Storage seg_storage = Storage::f32;
  const void* cm_logits = nullptr;  // (B or 1, C, C, grid), the batch axis with its own stride
  Storage cm_storage = Storage::f32;
  int64_t cm_batch = 0;          // 1: the same field for every image
  int64_t cm_batch_stride = 0;   // elements; 0 for an expanded field
  const void* labels = nullptr;  // (B, D, H, W)
  LabelType label_type = LabelType::u8;
  int64_t ignore_index = 255;
  const R* transition = nullptr;      // (C, C); null: identity
  const R* log_transition = nullptr;  // its logarithm; CUDA only
  const R* class_weight = nullptr;    // (C)
  const R* pixel_weight = nullptr;    // (B, D, H, W)
  R trace_weight = 0;
  R gradient_scale = 1;      // on CUDA times *scale, a value that the host does not know
  const R* scale = nullptr;  // CUDA only; null: 1

  // Gradients of gradient_scale * sum w (nll + trace_weight * tr A). On a strided grid, and where one field serves
  // several images, cm_gradient is float/double (cm_gradient_storage says which) and arrives filled with zeros.
  void* seg_gradient = nullptr;  // as seg_logits
  void* cm_gradient = nullptr;   // (cm_batch, C, C, grid)
  Storage cm_gradient_storage = Storage::f32;
  R* nll_map = nullptr;       // (B, D, H, W): w nll
  R* trace_map = nullptr;     // (B, D, H, W): w tr A
  R* loss_map = nullptr;      // (B, D, H, W): w (nll + trace_weight * tr A); CUDA only, with the other two
  void* posterior = nullptr;  // as seg_logits

  // One row per task (CUDA: per block), so that the sums do not depend on the number of threads.
  double* sums = nullptr;                 // (tasks, 2): sum w nll, sum w tr A
  double* transition_gradient = nullptr;  // (tasks, C, C), zeros on arrival
  uint32_t* small_mask = nullptr;         // CUDA: a bit a pixel, see cuda/launch.h
  unsigned char* bad_label = nullptr;     // (tasks): set where a label is out of range; CPU only

  COARSE_HD int64_t pixels() const { return depth * height * width; }
};

}  // namespace coarse
