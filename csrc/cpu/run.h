// A problem run on the CPU: cut into tasks, computed, and what the tasks leave behind added up in their order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../describe.h"
#include "matrices.h"
#include "plan.h"
#include "pool.h"

namespace {

using Bytes = std::unique_ptr<void, decltype(&std::free)>;

Bytes workspace(int64_t bytes) {
  return {std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), &std::free};
}

// `task(k, workspace)` for every k: slices in parallel, the tasks of a slice in their order.
template <class R, class F>
void run_tasks(const coarse::Plan<R>& plan, int64_t workspace_bytes, const F& task) {
  std::atomic<bool> out_of_memory{false};  // an exception could not leave a worker thread
  torch::stable::parallel_for(0, plan.slices, 1, [&](int64_t first, int64_t last) {
    const Bytes space = workspace(std::max<int64_t>(workspace_bytes, 64));
    if (space == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t k = plan.first_task(first); k < plan.first_task(last); ++k) task(k, space.get());
  });
  STD_TORCH_CHECK(!out_of_memory, "out of memory: a thread's workspace of ", workspace_bytes, " bytes");
}

template <class R>
const coarse::KernelSet<R>& kernel_set() {
  if constexpr (sizeof(R) == 4) {
    return coarse::kernels().f32;
  } else {
    return coarse::kKernelsDouble;
  }
}

// What the tasks leave of one kind of drawings.
struct Totals {
  coarse::CompensatedSum nll, trace;
  std::vector<double> transition_gradient;
};

template <class R>
class Run {
 public:
  // `kinds` is what the problem points to. Gradients of fields that are wanted are in place: whole tensors, contiguous.
  Run(Problem<R> problem, std::vector<Drawings<R>>& kinds, const Tensor& like, const std::vector<bool>& want_transition)
      : problem_(problem), kinds_(kinds), like_(like), want_transition_(want_transition) {}

  std::vector<Totals> run() {
    const size_t count = kinds_.size();
    std::vector<Totals> totals(count);
    const int64_t c = problem_.classes, entries = c * c;
    for (size_t k = 0; k < count; ++k)
      totals[k].transition_gradient.resize(want_transition_[k] ? static_cast<size_t>(entries) : 0);
    if (problem_.batch == 0 || problem_.pixels() == 0) {
      clear(problem_.seg, c);
      for (Drawings<R>& kind : kinds_) clear(kind.field, entries);
      return totals;
    }
    coarse::Planned<R> planned(problem_);
    coarse::Plan<R>& plan = planned.plan;
    book(plan.seg, problem_.seg, c, plan, false);
    for (size_t k = 0; k < count; ++k) {
      const bool shared = kinds_[k].field.images == 1 && problem_.batch > 1;
      if (coarse::form_of(problem_, plan, static_cast<int>(k)) == coarse::Form::one_matrix) {
        form(plan, static_cast<int>(k));
        continue;
      }
      book(plan.kinds[k], kinds_[k].field, entries, plan, shared);
    }
    planned.learn_transitions(std::count(want_transition_.begin(), want_transition_.end(), true), c);
    const int64_t tasks = plan.tasks();
    std::vector<std::vector<coarse::CompensatedSum>> sums(count);
    std::vector<std::vector<double>> transitions(count);
    for (size_t k = 0; k < count; ++k) {
      sums[k].resize(2 * static_cast<size_t>(tasks));
      transitions[k].resize(want_transition_[k] ? static_cast<size_t>(plan.slices * entries) : 0);
      kinds_[k].sums = sums[k].data();
      kinds_[k].transition_gradient = want_transition_[k] ? transitions[k].data() : nullptr;
    }
    std::vector<unsigned char> bad(static_cast<size_t>(tasks), 0);
    problem_.bad_label = bad.data();
    const auto& kernels = kernel_set<R>();
    run_tasks(plan, kernels.workspace(problem_, plan),
              [&](int64_t task, void* space) { kernels.run(problem_, plan, task, space); });
    for (unsigned char b : bad)
      STD_TORCH_CHECK(b == 0, "labels: expected in [0, C) or ignore_index, got one out of range");
    for (size_t k = 0; k < count; ++k) {
      for (int64_t t = 0; t < tasks; ++t) {
        totals[k].nll.add(sums[k][static_cast<size_t>(2 * t)]);
        totals[k].trace.add(sums[k][static_cast<size_t>(2 * t + 1)]);
      }
      for (int64_t slice = 0; slice < plan.slices; ++slice) {
        for (size_t n = 0; n < totals[k].transition_gradient.size(); ++n)
          totals[k].transition_gradient[n] += transitions[k][slice * entries + static_cast<int64_t>(n)];
      }
    }
    for (const Booking& booking : bookings_) settle(booking, plan);
    for (auto& [k, matrices] : matrices_) settle(matrices, kinds_[k].field, totals[k].transition_gradient);
    return totals;
  }

 private:
  // Sums of a gradient that is not written pixel by pixel.
  struct Booking {
    coarse::FieldPlan<R>* field;
    const Field* tensor;
    int64_t planes, owners;  // images, or groups of them
    Tensor sum;
    OptionalTensor heads;
    bool converted;  // `sum` is not the gradient itself
  };

  static void clear(const Field& field, int64_t planes) {
    if (field.gradient == nullptr) return;
    std::memset(field.gradient, 0,
                static_cast<size_t>(field.images * planes * field.points() * coarse::bytes_of(field.storage)));
  }

  void book(coarse::FieldPlan<R>& field, const Field& tensor, int64_t planes, const coarse::Plan<R>& plan,
            bool shared) {
    if (tensor.gradient == nullptr || (field.on_pixels && !shared)) return;
    const int64_t n = planes * tensor.points(), owners = shared ? plan.groups : tensor.images;
    constexpr coarse::Storage own = sizeof(R) == 4 ? coarse::Storage::f32 : coarse::Storage::f64;
    Booking booking{
        &field, &tensor, planes, owners, like_, std::nullopt, tensor.storage != own || (shared && owners > 1)};
    if (booking.converted) {
      booking.sum = output_tensor(like_, {owners, n}, dtype_of<R>());
      field.sum = static_cast<R*>(booking.sum.data_ptr());
    } else {
      field.sum = static_cast<R*>(tensor.gradient);
    }
    const bool zeroed = field.zeroed || field.on_pixels;
    if (zeroed) std::memset(field.sum, 0, sizeof(R) * static_cast<size_t>(owners * n));
    const int64_t heads = owners * plan.chunk_count * field.head_slots * planes * field.unit;
    if (!field.on_pixels && heads > 0) {
      booking.heads = output_tensor(like_, {heads}, dtype_of<R>());
      field.heads = static_cast<R*>(booking.heads->data_ptr());
      if (zeroed) std::memset(field.heads, 0, sizeof(R) * static_cast<size_t>(heads));
    }
    bookings_.push_back(std::move(booking));
  }

  // Seams in the order of the chunks, copies in that of the groups, in double, then rounded to storage once.
  void settle(const Booking& booking, const coarse::Plan<R>& plan) const {
    const coarse::FieldPlan<R>& field = *booking.field;
    const int64_t points = booking.tensor->points(), planes = booking.planes, n = planes * points;
    const bool one = booking.tensor->images == 1;
    const auto settle_planes = [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const int64_t owner = k / planes, plane = k % planes;
        R* const to = field.sum + owner * n + plane * points;
        for (int64_t chunk = 0; booking.heads.has_value() && chunk < plan.chunk_count; ++chunk) {
          const R* const from =
              field.heads + (owner * plan.chunk_count + chunk) * field.head_slots * planes * field.unit;
          for (int64_t slot = 0; slot < field.head_count[chunk]; ++slot) {
            R* const row = to + (field.head_first[chunk] + slot) * field.unit;
            const R* const seam = from + (slot * planes + plane) * field.unit;
            for (int64_t x = 0; x < field.unit; ++x) row[x] += seam[x];
          }
        }
      }
    };
    torch::stable::parallel_for(0, booking.owners * planes, 8, settle_planes);
    if (!booking.converted) return;
    const int64_t images = one ? 1 : booking.owners;
    if (one && booking.owners > 1) {
      for (int64_t k = 0; k < n; ++k) {
        double total = 0;
        for (int64_t copy = 0; copy < booking.owners; ++copy) total += static_cast<double>(field.sum[copy * n + k]);
        field.sum[k] = static_cast<R>(total);
      }
    }
    write(field.sum, *booking.tensor, images * n);
  }

  static void write(const R* from, const Field& to, int64_t n) {
    if constexpr (sizeof(R) == 4) {
      coarse::kernels().convert(from, to.gradient, to.storage, n);
    } else {
      std::memcpy(to.gradient, from, sizeof(R) * static_cast<size_t>(n));
    }
  }

  // --- one matrix for all pixels of an image -------------------------------------------------------------------------

  // So many columns of C exponentials and C x C multiply-adds that a thread is worth it.
  int64_t grain() const {
    const int64_t c = problem_.classes;
    return std::max<int64_t>(1, (int64_t{1} << 18) / (c * (c + 16)));
  }

  void form(coarse::Plan<R>& plan, int k) {
    auto& matrices = matrices_
                         .emplace_back(std::piecewise_construct, std::forward_as_tuple(static_cast<size_t>(k)),
                                       std::forward_as_tuple(problem_, plan, k, want_transition_[k]))
                         .second;
    torch::stable::parallel_for(0, matrices.columns(), grain(), [&](int64_t first, int64_t last) {
      for (int64_t column = first; column < last; ++column) matrices.form(column);
    });
    matrices.find_traces();
    plan.matrices[k] = matrices.plan();
  }

  void settle(coarse::Matrices<R>& matrices, const Field& field, std::vector<double>& transition) const {
    if (!matrices.counted()) return;
    torch::stable::parallel_for(0, matrices.images(), std::max<int64_t>(1, grain() / 32),
                                [&](int64_t first, int64_t last) {
                                  for (int64_t image = first; image < last; ++image) matrices.gather(image);
                                });
    if (!transition.empty()) {
      torch::stable::parallel_for(0, problem_.classes, grain(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) matrices.settle_transition(i, transition.data());
      });
    }
    if (field.gradient == nullptr) return;
    torch::stable::parallel_for(0, matrices.columns(), grain(), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) matrices.settle(row);
    });
    const std::vector<R> rounded(matrices.gradient().begin(), matrices.gradient().end());
    write(rounded.data(), field, static_cast<int64_t>(rounded.size()));
  }

  Problem<R> problem_;
  std::vector<Drawings<R>>& kinds_;
  const Tensor& like_;
  const std::vector<bool>& want_transition_;
  std::deque<Booking> bookings_;
  std::deque<std::pair<size_t, coarse::Matrices<R>>> matrices_;  // of the kinds that have one for all pixels
};

}  // namespace
