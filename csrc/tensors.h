// Tensors of the LibTorch stable ABI: what the operators of every device do with them first.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "storage.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bits of `wanted` (operator.py).
constexpr int64_t kSeg = 1;
constexpr int64_t cm_bit(int64_t kind) { return int64_t{2} << 2 * kind; }
constexpr int64_t transition_bit(int64_t kind) { return int64_t{4} << 2 * kind; }

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

// The grid of a field whose first `planes` axes are others, in three axes as the pixels have them.
std::array<int64_t, 3> grid_of(const Tensor& field, int64_t planes) {
  std::array<int64_t, 3> grid{1, 1, 1};
  const int64_t rank = field.dim() - planes;
  for (int64_t axis = 0; axis < rank; ++axis) grid[3 - rank + axis] = field.size(planes + axis);
  return grid;
}

}  // namespace
