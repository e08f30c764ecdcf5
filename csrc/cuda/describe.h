// Tensors described as a `Stream`.
#pragma once

#include "../tensors.h"
#include "single.h"

namespace {

using coarse::Stream;
constexpr int64_t kCm = cm_bit(0), kTransition = transition_bit(0);

template <class R>
const R* constant(OptionalTensor& t, int64_t numel, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == dtype_of<R>() && t->numel() == numel, name, ": wrong dtype or size");
  t = torch::stable::contiguous(*t);
  return static_cast<const R*>(t->data_ptr());
}

// Tensors that a `Stream` points into: kept alive, and made contiguous where they are not.
struct Inputs {
  Tensor seg_logits, cm_logits, labels;
  OptionalTensor transition, class_weight, pixel_weight;
};

template <class R>
Stream<R> describe(Inputs& in, int64_t ignore_index) {
  in.seg_logits = torch::stable::contiguous(in.seg_logits);
  in.labels = torch::stable::contiguous(in.labels);
  if (!contiguous_images(in.cm_logits)) in.cm_logits = torch::stable::contiguous(in.cm_logits);
  const int64_t rank = in.labels.dim() - 1;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3, "labels: expected 1 to 3 spatial axes");
  STD_TORCH_CHECK(in.seg_logits.dim() == rank + 2 && in.cm_logits.dim() == rank + 3,
                  "logits: ranks do not fit the labels");

  Stream<R> s;
  s.batch = in.seg_logits.size(0);
  s.classes = static_cast<int>(in.seg_logits.size(1));
  s.width = in.labels.size(rank);
  if (rank > 1) s.height = in.labels.size(rank - 1);
  if (rank > 2) s.depth = in.labels.size(rank - 2);
  s.seg_logits = in.seg_logits.data_ptr();
  s.seg_storage = storage_of(in.seg_logits, "seg_logits");
  s.cm_logits = in.cm_logits.data_ptr();
  s.cm_storage = storage_of(in.cm_logits, "cm_logits");
  s.cm_batch = in.cm_logits.size(0);
  s.cm_batch_stride = s.cm_batch == 1 ? 0 : in.cm_logits.stride(0);
  s.labels = in.labels.data_ptr();
  s.label_type = label_type_of(in.labels);
  s.ignore_index = ignore_index;
  s.transition = constant<R>(in.transition, static_cast<int64_t>(s.classes) * s.classes, "transition");
  s.class_weight = constant<R>(in.class_weight, s.classes, "class_weight");
  s.pixel_weight = constant<R>(in.pixel_weight, in.labels.numel(), "pixel_weight");
  STD_TORCH_CHECK(
      in.seg_logits.numel() == s.batch * s.classes * s.pixels() && in.labels.numel() == s.batch * s.pixels(),
      "seg_logits: expected on the pixel grid of the labels");
  STD_TORCH_CHECK((s.cm_batch == 1 || s.cm_batch == s.batch) && in.cm_logits.size(1) == s.classes &&
                      in.cm_logits.size(2) == s.classes,
                  "cm_logits: expected (B or 1, C, C, *G)");
  STD_TORCH_CHECK((s.seg_storage == coarse::Storage::f64) == (sizeof(R) == 8) &&
                      (s.cm_storage == coarse::Storage::f64) == (sizeof(R) == 8),
                  "logits: float64 goes with float64 only");
  return s;
}

}  // namespace
