// One call of an operator on the CPU: the tasks that a `Stream` is cut into, the tensors that come out.
#pragma once

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
#include "tensors.h"

namespace {

template <class R>
double scalar_value(const OptionalTensor& t) {
  if (!t.has_value()) return 1.0;
  STD_TORCH_CHECK(t->scalar_type() == dtype_of<R>() && t->numel() == 1,
                  "scale: expected one value in the compute dtype");
  return static_cast<double>(*static_cast<const R*>(t->data_ptr()));
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
