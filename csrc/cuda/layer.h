// One layer of a kind of drawings with a matrix, as the kernels of its launches see it: raw pointers and sizes, small
// enough to be a kernel's parameter. `Problem` and `Drawings` flattened, with what the kernels leave for each other.
#pragma once

#include "../host_device.h"
#include "../problem.h"

namespace coarse {

// An absent tensor is null. Pointers to labels, weights and maps are to this layer of the first image.
template <class R>
struct Layer {
  int64_t batch = 0, depth = 1, height = 1, width = 0;
  int classes = 0;
  int64_t ignore_index = 255;
  int64_t map_stride = 0;  // of labels, pixel weights and maps: from one image to the next

  const void* seg_logits = nullptr;  // (B, C, seg_grid)
  Storage seg_storage = Storage::f32;
  int seg_grid[3] = {1, 1, 1};
  bool seg_on_pixels = true;
  // What launch.h calls a region has them at its pixels: from one class, one image, to the next.
  int64_t seg_plane = 0, seg_image = 0;

  // Of each class and pixel: the gradient of its logit, or the posterior. On the pixel grid, (B, C, D, H, W), or of a
  // region alone: `PixelRegion`. Null: not wanted.
  void* class_out = nullptr;
  Storage class_storage = Storage::f32;
  int64_t class_plane = 0, class_image = 0;  // from one class, one image, to the next
  bool add_class = false;                    // to what is there (in R), which other layers have left
  bool posterior = false;                    // instead of loss and gradients
  // Instead, where the class logits have a grid of their own and strided.cu works: what each tile has for the grid
  // points that it reads (strided_tiles.h), to be gathered.
  R* class_tiles = nullptr;

  const void* cm_logits = nullptr;  // (B or 1, C, C, grid), the batch axis with its own stride
  Storage cm_storage = Storage::f32;
  int64_t cm_batch = 0;         // 1: the same field for every image
  int64_t cm_batch_stride = 0;  // elements; 0 for an expanded field
  // On a grid of cells, and where one field serves several images, R and filled with zeros before the first launch.
  void* cm_gradient = nullptr;
  Storage cm_gradient_storage = Storage::f32;
  bool add_cm = false;  // to what is there (in R)

  const void* labels = nullptr;
  LabelType label_type = LabelType::u8;
  const R* transition = nullptr;      // (C, C); null: identity
  const R* log_transition = nullptr;  // its logarithm
  const R* class_weight = nullptr;    // (C)
  const R* pixel_weight = nullptr;
  R trace_weight = 0;
  // Gradients are those of weight * *scale * sum w (nll + trace_weight * tr A).
  R weight = 1;
  const R* scale = nullptr;  // a value that the host does not know; null: 1

  R* nll_map = nullptr;    // w nll
  R* trace_map = nullptr;  // w tr A
  R* loss_map = nullptr;   // w (nll + trace_weight * tr A), with the other two

  double* sums = nullptr;                 // (kSumRows, 2): sum w nll, sum w tr A
  double* transition_gradient = nullptr;  // (transition_slices, C, C), zeros before the first launch
  uint32_t* small_mask = nullptr;         // a bit a pixel, see launch.h

  COARSE_HD int64_t pixels() const { return depth * height * width; }
  COARSE_HD int64_t seg_points() const { return static_cast<int64_t>(seg_grid[0]) * seg_grid[1] * seg_grid[2]; }
};

// Layer `number` of kind k. What is to be written, and the workspace, is the caller's to say.
template <class R>
Layer<R> layer_of(const Problem<R>& problem, int k, int64_t number) {
  const Drawings<R>& kind = problem.kinds[k];
  Layer<R> s;
  s.batch = problem.batch;
  s.depth = problem.depth;
  s.height = problem.height;
  s.width = problem.width;
  s.classes = problem.classes;
  s.ignore_index = problem.ignore_index;
  s.map_stride = kind.layers * problem.pixels();
  s.seg_logits = problem.seg.data;
  s.seg_storage = problem.seg.storage;
  const int64_t size[3] = {problem.depth, problem.height, problem.width};
  for (int axis = 0; axis < 3; ++axis) {
    s.seg_grid[axis] = static_cast<int>(problem.seg.grid[axis]);
    s.seg_on_pixels = s.seg_on_pixels && problem.seg.grid[axis] == size[axis];
  }
  s.cm_logits = kind.field.data;
  s.cm_storage = kind.field.storage;
  s.cm_batch = kind.field.images;
  s.cm_batch_stride = kind.field.image_stride;
  const int64_t at = number * problem.pixels();
  const auto from = [&](auto* p) { return p == nullptr ? p : p + at; };
  s.labels = static_cast<const char*>(kind.labels) + at * (kind.label_type == LabelType::u8 ? 1 : 8);
  s.label_type = kind.label_type;
  s.transition = kind.transition;
  s.class_weight = kind.class_weight;
  s.pixel_weight = from(kind.pixel_weight);
  s.trace_weight = kind.trace_weight;
  s.nll_map = from(kind.nll_map);
  s.trace_map = from(kind.trace_map);
  return s;
}

}  // namespace coarse
