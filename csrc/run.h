// One call of an operator: tensors described as a `Stream`, the tasks that it is cut into, the tensors that come out.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "coarse_math.h"
#include "cpu/plan.h"
#include "cpu/problem.h"

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

template <class R>
double scalar_value(const OptionalTensor& t) {
  if (!t.has_value()) return 1.0;
  STD_TORCH_CHECK(t->scalar_type() == dtype_of<R>() && t->numel() == 1,
                  "scale: expected one value in the compute dtype");
  return static_cast<double>(*static_cast<const R*>(t->data_ptr()));
}

// --- one call --------------------------------------------------------------------------------------------------------

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

using Bytes = std::unique_ptr<void, decltype(&std::free)>;

Bytes workspace(int64_t bytes) {
  return {std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), &std::free};
}

// Runs `task(k, workspace)` for every k: tasks of one phase in parallel, phases in order.
template <class F>
void run_tasks(int64_t begin, int64_t end, int64_t workspace_bytes, const F& task) {
  std::atomic<bool> out_of_memory{false};  // an exception could not leave a worker thread
  torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
    const Bytes space = workspace(workspace_bytes);
    if (space == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t k = first; k < last; ++k) task(k, space.get());
  });
  STD_TORCH_CHECK(!out_of_memory, "out of memory: a thread's workspace of ", workspace_bytes, " bytes");
}

// What the tasks leave behind.
struct Totals {
  double nll = 0, trace = 0;
  std::vector<double> transition_gradient;
};

template <class R>
const coarse::KernelSet<R>& kernel_set() {
  if constexpr (sizeof(R) == 4) {
    return coarse::kernels().f32;
  } else {
    return coarse::kKernelsDouble;
  }
}

template <class R>
class Run {
 public:
  Run(Inputs inputs, int64_t ignore_index) : in_(std::move(inputs)), s_(describe<R>(in_, ignore_index)) {
    const std::array<int64_t, 3> grid = grid_of(in_.cm_logits);
    const std::array<int64_t, 3> size{s_.depth, s_.height, s_.width};
    for (int axis = 0; axis < 3; ++axis) {
      STD_TORCH_CHECK(grid[axis] <= size[axis] && (grid[axis] > 0 || size[axis] == 0),
                      "cm_logits: its grid does not fit");
    }
    on_pixels_ = grid == size;
    if (!on_pixels_) plan_ = coarse::plan_strided(s_, grid);
  }

  Stream<R>& stream() { return s_; }
  const Inputs& inputs() const { return in_; }

  Tensor want_seg_gradient() {
    Tensor gradient = new_tensor(in_.seg_logits, sizes_of(in_.seg_logits), in_.seg_logits.scalar_type());
    s_.seg_gradient = gradient.data_ptr();
    return gradient;
  }

  Tensor want_cm_gradient() {
    gradient_ = new_tensor(in_.cm_logits, sizes_of(in_.cm_logits), in_.cm_logits.scalar_type());
    const int64_t n = gradient_.numel();
    const bool half = s_.cm_storage == coarse::Storage::bf16 || s_.cm_storage == coarse::Storage::f16;
    // sums start from zero; so does the gradient of a shared field when there is no image to write it
    const bool sums = !on_pixels_ || (s_.cm_batch == 1 && s_.batch != 1);
    const int64_t copies = on_pixels_ ? 1 : plan_.copies;
    s_.cm_gradient_storage = s_.cm_storage;
    s_.cm_gradient = gradient_.data_ptr();
    if (sums && (half || copies > 1)) {
      summed_ = new_tensor(gradient_, {copies, n}, dtype_of<R>());
      s_.cm_gradient = summed_->data_ptr();
      s_.cm_gradient_storage = sizeof(R) == 4 ? coarse::Storage::f32 : coarse::Storage::f64;
      plan_.grid.copy_stride = n;
    }
    if (sums) std::memset(s_.cm_gradient, 0, sizeof(R) * static_cast<size_t>(copies * n));
    return gradient_;
  }

  void want_transition_gradient() { want_transition_ = true; }

  Totals run() {
    const int64_t tasks = on_pixels_ ? pixel_tasks() : static_cast<int64_t>(plan_.tasks.size());
    const int64_t entries = static_cast<int64_t>(s_.classes) * s_.classes;
    std::vector<double> sums(2 * static_cast<size_t>(tasks)), transition(want_transition_ ? tasks * entries : 0);
    std::vector<unsigned char> bad(tasks, 0);
    s_.sums = sums.data();
    s_.transition_gradient = want_transition_ ? transition.data() : nullptr;
    s_.bad_label = bad.data();
    if (on_pixels_) {
      run_pixels();
    } else {
      run_strided();
    }
    for (unsigned char b : bad)
      STD_TORCH_CHECK(b == 0, "labels: expected in [0, C) or ignore_index, got one out of range");
    Totals totals;
    totals.transition_gradient.resize(want_transition_ ? entries : 0);
    for (int64_t t = 0; t < tasks; ++t) {
      totals.nll += sums[2 * t];
      totals.trace += sums[2 * t + 1];
      for (size_t k = 0; k < totals.transition_gradient.size(); ++k)
        totals.transition_gradient[k] += transition[t * entries + k];
    }
    finish_cm_gradient();
    return totals;
  }

 private:
  static constexpr int64_t kPixelsPerTask = 4096;

  bool shared_field() const { return s_.cm_batch == 1 && s_.batch > 1; }
  int64_t pixel_ranges() const { return (s_.pixels() + kPixelsPerTask - 1) / kPixelsPerTask; }
  int64_t pixel_tasks() const { return pixel_ranges() * (shared_field() ? 1 : s_.batch); }

  void run_pixels() {
    const auto& kernels = kernel_set<R>();
    run_tasks(0, pixel_tasks(), kernels.pixel_workspace(s_), [&](int64_t task, void* space) {
      const int64_t begin = task % pixel_ranges() * kPixelsPerTask;
      const int64_t end = std::min(begin + kPixelsPerTask, s_.pixels());
      kernels.pixel_grid(s_, task, task / pixel_ranges(), begin, end, space);
    });
  }

  void run_strided() {
    const auto& kernels = kernel_set<R>();
    const int64_t bytes = kernels.strided_workspace(s_, plan_.grid);
    const auto run_range = [&](int64_t begin, int64_t end) {
      run_tasks(begin, end, bytes, [&](int64_t task, void* space) {
        const coarse::StridedTask& t = plan_.tasks[task];
        kernels.strided_grid(s_, plan_.grid, task, t.band, t.z, t.b0, t.b1, space);
      });
    };
    if (s_.cm_gradient == nullptr) return run_range(0, static_cast<int64_t>(plan_.tasks.size()));
    for (size_t phase = 0; phase + 1 < plan_.phases.size(); ++phase)
      run_range(plan_.phases[phase], plan_.phases[phase + 1]);
  }

  // Copies summed in their order, then rounded to storage once.
  void finish_cm_gradient() {
    if (!summed_.has_value()) return;
    const int64_t n = gradient_.numel(), copies = summed_->size(0);
    R* sum = static_cast<R*>(summed_->data_ptr());
    for (int64_t copy = 1; copy < copies; ++copy) {
      for (int64_t k = 0; k < n; ++k) sum[k] += sum[copy * n + k];
    }
    if constexpr (sizeof(R) == 4) {
      coarse::kernels().convert(sum, gradient_.data_ptr(), s_.cm_storage, n);
    } else {
      std::memcpy(gradient_.data_ptr(), sum, sizeof(R) * static_cast<size_t>(n));
    }
  }

  Inputs in_;
  Stream<R> s_;
  bool on_pixels_ = true, want_transition_ = false;
  coarse::StridedPlan<R> plan_;
  Tensor gradient_;
  OptionalTensor summed_;
};

}  // namespace
