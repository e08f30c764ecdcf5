// Tensors described as a `Problem`.
#pragma once

#include <array>
#include <vector>

#include "problem.h"
#include "tensors.h"

namespace {

using coarse::Drawings;
using coarse::Field;
using coarse::Problem;

// The leading arguments of the operators (operator.py, `Arguments`): lists have an element for each kind of drawings.
// Kept alive, and made contiguous where they are not.
struct Inputs {
  Tensor seg_logits;
  std::vector<Tensor> labels, cm_logits, transition, class_weight, pixel_weight, scale;

  size_t kinds() const { return labels.size(); }
  // float64 if any logits are
  bool wide() const {
    bool wide = seg_logits.scalar_type() == ScalarType::Double;
    for (const Tensor& field : cm_logits) wide = wide || field.scalar_type() == ScalarType::Double;
    return wide;
  }
};

// An element of a list that stands for nothing has the shape (0,).
bool present(const Tensor& t) { return t.dim() != 1 || t.numel() > 0; }

template <class R>
const R* constant(Tensor& t, int64_t numel, const char* name) {
  if (!present(t)) return nullptr;
  STD_TORCH_CHECK(t.scalar_type() == dtype_of<R>() && t.numel() == numel, name, ": wrong dtype or size");
  t = torch::stable::contiguous(t);
  return static_cast<const R*>(t.data_ptr());
}

Field field_of(Tensor& t, int64_t planes, const char* name) {
  if (!contiguous_images(t)) t = torch::stable::contiguous(t);
  Field field;
  field.data = t.data_ptr();
  field.storage = storage_of(t, name);
  field.images = t.size(0);
  field.image_stride = field.images == 1 ? 0 : t.stride(0);
  const std::array<int64_t, 3> grid = grid_of(t, planes);
  for (int axis = 0; axis < 3; ++axis) field.grid[axis] = grid[axis];
  return field;
}

// `kinds` is what the problem points to.
template <class R>
Problem<R> describe(Inputs& in, int64_t ignore_index, std::vector<Drawings<R>>& kinds) {
  const size_t count = in.kinds();
  STD_TORCH_CHECK(count >= 1 && count <= coarse::kMaxKinds, "labels: expected 1 to ", coarse::kMaxKinds, " kinds");
  STD_TORCH_CHECK(in.cm_logits.size() == count && in.transition.size() == count,
                  "one element for each kind of drawings");
  in.seg_logits = torch::stable::contiguous(in.seg_logits);
  const int64_t rank = in.seg_logits.dim() - 2;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3, "seg_logits: expected 1 to 3 spatial axes");
  Problem<R> problem;
  problem.batch = in.seg_logits.size(0);
  problem.classes = static_cast<int>(in.seg_logits.size(1));
  problem.ignore_index = ignore_index;
  problem.seg = field_of(in.seg_logits, 2, "seg_logits");
  const auto fits = [](const Field& field, const int64_t* size, const char* name) {
    STD_TORCH_CHECK((field.storage == coarse::Storage::f64) == (sizeof(R) == 8), name,
                    ": float64 goes with float64 only");
    for (int axis = 0; axis < 3; ++axis) {
      STD_TORCH_CHECK(field.grid[axis] <= size[axis] && (field.grid[axis] > 0 || size[axis] == 0), name,
                      ": its grid does not fit");
    }
  };
  kinds.resize(count);
  for (size_t k = 0; k < count; ++k) {
    Tensor& labels = in.labels[k];
    labels = torch::stable::contiguous(labels);
    STD_TORCH_CHECK(labels.dim() == rank + 2 && labels.size(0) == problem.batch, "labels: expected (B, K, *S)");
    const int64_t size[3] = {rank > 2 ? labels.size(rank - 1) : 1, rank > 1 ? labels.size(rank) : 1,
                             labels.size(rank + 1)};
    if (k == 0) {
      problem.depth = size[0];
      problem.height = size[1];
      problem.width = size[2];
      fits(problem.seg, size, "seg_logits");
    }
    STD_TORCH_CHECK(size[0] == problem.depth && size[1] == problem.height && size[2] == problem.width,
                    "labels: expected one pixel grid for all kinds");
    Drawings<R>& kind = kinds[k];
    kind.labels = labels.data_ptr();
    kind.label_type = label_type_of(labels);
    kind.layers = labels.size(1);
    const int64_t c = problem.classes;
    if (present(in.cm_logits[k])) {
      Tensor& cm = in.cm_logits[k];
      STD_TORCH_CHECK(cm.dim() == rank + 3 && (cm.size(0) == 1 || cm.size(0) == problem.batch) && cm.size(1) == c &&
                          cm.size(2) == c,
                      "cm_logits: expected (B or 1, C, C, *G)");
      kind.field = field_of(cm, 3, "cm_logits");
      fits(kind.field, size, "cm_logits");
    }
    kind.transition = constant<R>(in.transition[k], c * c, "transition");
    if (in.class_weight.empty()) continue;
    kind.class_weight = constant<R>(in.class_weight[k], c, "class_weight");
    kind.pixel_weight = constant<R>(in.pixel_weight[k], labels.numel(), "pixel_weight");
  }
  problem.kinds = kinds.data();
  problem.kind_count = static_cast<int>(count);
  return problem;
}

// Class logits alone, to be read at the pixels of a grid of `size`.
template <class R>
Problem<R> describe_logits(Tensor& seg_logits, const std::vector<int64_t>& size) {
  const int64_t rank = seg_logits.dim() - 2;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3 && static_cast<int64_t>(size.size()) == rank,
                  "size: one number for each axis");
  STD_TORCH_CHECK(seg_logits.size(1) >= 1, "seg_logits: expected at least one class");
  seg_logits = torch::stable::contiguous(seg_logits);
  Problem<R> problem;
  problem.batch = seg_logits.size(0);
  problem.classes = static_cast<int>(seg_logits.size(1));
  problem.seg = field_of(seg_logits, 2, "seg_logits");
  problem.width = size[rank - 1];
  if (rank > 1) problem.height = size[rank - 2];
  if (rank > 2) problem.depth = size[rank - 3];
  const int64_t pixels[3] = {problem.depth, problem.height, problem.width};
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(problem.seg.grid[axis] <= pixels[axis] && (problem.seg.grid[axis] > 0 || pixels[axis] == 0),
                    "seg_logits: its grid does not fit");
  }
  return problem;
}

}  // namespace
