// Tensors described as a `Stream`: what the operators of every device do first. On the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "stream.h"

namespace {

using coarse::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Wanted : int64_t { kSeg = 1, kCm = 2, kTransition = 4 };

// --- tensors ---------------------------------------------------------------------------------------------------------

Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device());
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

coarse::Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return coarse::Storage::f32;
    case ScalarType::Double: return coarse::Storage::f64;
    case ScalarType::BFloat16: return coarse::Storage::bf16;
    case ScalarType::Half: return coarse::Storage::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16 storage");
  }
}

coarse::LabelType label_type_of(const Tensor& labels) {
  const bool byte = labels.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(byte || labels.scalar_type() == ScalarType::Long, "labels: expected uint8 or int64");
  return byte ? coarse::LabelType::u8 : coarse::LabelType::i64;
}

// Contiguous but for the batch axis, whose stride may be anything (0 for an expanded field): no copy then.
bool contiguous_images(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t axis = t.dim() - 1; axis > 0; --axis) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

template <class R>
constexpr ScalarType dtype_of() {
  return sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double;
}

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

// The grid of the CM field in three axes, as Stream has the pixels.
std::array<int64_t, 3> grid_of(const Tensor& cm_logits) {
  std::array<int64_t, 3> grid{1, 1, 1};
  const int64_t rank = cm_logits.dim() - 3;
  for (int64_t axis = 0; axis < rank; ++axis) grid[3 - rank + axis] = cm_logits.size(3 + axis);
  return grid;
}

}  // namespace
