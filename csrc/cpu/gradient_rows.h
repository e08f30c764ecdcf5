// The gradient of a field on its grid: a sum over pixels, of which a task holds the few rows of the grid that it is
// working on. Rows leave when the task is past them; see FieldPlan for where they go. So sums are in an order that the
// plan fixes, and no pixel's share is ever stored.
#pragma once

#include "common.h"

namespace coarse {
namespace {

template <class R>
class GradientRows {
 public:
  void init(const Field& field, const FieldPlan<R>& plan, int64_t planes, int64_t chunks, Arena& arena) {
    plan_ = &plan;
    planes_ = planes;
    points_ = field.points();
    one_for_all_ = field.images == 1;
    chunks_ = chunks;
    pitch_ = round_up(plan.span, kLanes<R>) + 2 * kLanes<R>;  // vectors of points begin anywhere
    rows_ = arena.take<R>(plan.rows * planes * pitch_);
  }

  // The rows of slice z of an image; `first`: of the images of this group.
  void start(int64_t image, int64_t group, int64_t chunk, int64_t z, bool first) {
    const int64_t own = one_for_all_ ? group : image;
    sum_ = plan_->sum + own * planes_ * points_;
    heads_ = plan_->heads + (own * chunks_ + chunk) * plan_->head_slots * planes_ * plan_->unit;
    head_first_ = plan_->head_first[chunk];
    head_end_ = head_first_ + plan_->head_count[chunk];
    x_first_ = plan_->x_first[chunk];
    x_count_ = plan_->x_count[chunk];
    z_ = z;
    adds_ = plan_->zeroed || (one_for_all_ && !first);
    first_ = end_ = 0;
  }

  // From here on rows [first, last].
  void need(int64_t first, int64_t last) {
    while (first_ < end_ && first_ < first) leave(first_++);
    if (first_ == end_) first_ = end_ = first;
    for (; end_ <= last; ++end_) memset(at(end_), 0, sizeof(R) * static_cast<size_t>(planes_ * pitch_));
  }

  void finish() {
    while (first_ < end_) leave(first_++);
  }

  // Row g from point `node` on.
  R* row(int64_t g, int64_t plane, int64_t node) const { return at(g) + plane * pitch_ + (node - x_first_); }

 private:
  R* at(int64_t g) const { return rows_ + g % plan_->rows * planes_ * pitch_; }

  void leave(int64_t g) {
    const Axis<R>& z = plan_->z;
    if (plan_->line) return leave_line();
    if (plan_->volume) {
      const R lambda = z.interpolated ? z.lambda[z_] : R(0);
      add(g, z.i0[z_], z.i0[z_], g * plan_->x.grid, R(1) - lambda);
      if (lambda != R(0)) add(g, z.next(z_), z.next(z_), g * plan_->x.grid, lambda);
    } else {
      add(g, g, 0, 0, R(1));
    }
  }

  // The one row of a line: its first points are heads.
  void leave_line() {
    const int64_t heads = head_end_ - head_first_;
    const auto leave = [&](R* to, R x) { *to = adds_ ? *to + x : x; };
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const R* const from = at(0) + plane * pitch_;
      for (int64_t k = 0; k < heads; ++k) leave(heads_ + k * planes_ + plane, from[k]);
      for (int64_t k = heads; k < x_count_; ++k) leave(sum_ + plane * points_ + x_first_ + k, from[k]);
    }
  }

  // weight * row g goes to `unit`, at `offset` in it; in slice `slice` of the grid.
  void add(int64_t g, int64_t unit, int64_t slice, int64_t offset, R weight) {
    const bool head = unit >= head_first_ && unit < head_end_;
    const int64_t w = plan_->x.grid;
    R* to =
        head ? heads_ + (unit - head_first_) * planes_ * plan_->unit + offset : sum_ + (slice * plan_->y.grid + g) * w;
    const int64_t stride = head ? plan_->unit : points_;
    const R* from = at(g);
    for (int64_t plane = 0; plane < planes_; ++plane, to += stride, from += pitch_) {
      if (adds_) {
        for (int64_t k = 0; k < w; ++k) to[k] += weight * from[k];
      } else {
        for (int64_t k = 0; k < w; ++k) to[k] = weight * from[k];
      }
    }
  }

  const FieldPlan<R>* plan_ = nullptr;
  int64_t planes_ = 0, points_ = 0, chunks_ = 0, pitch_ = 0;
  bool one_for_all_ = false, adds_ = false;
  R *rows_ = nullptr, *sum_ = nullptr, *heads_ = nullptr;
  int64_t head_first_ = 0, head_end_ = 0, z_ = 0, first_ = 0, end_ = 0, x_first_ = 0, x_count_ = 0;
};

}  // namespace
}  // namespace coarse
