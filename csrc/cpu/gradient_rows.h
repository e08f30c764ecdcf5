// The gradient of a field on its grid: a sum over pixels, of which a task holds the few rows of the grid that it is
// working on. Rows leave when the task is past them; see FieldPlan for where they go. So sums are in an order that the
// plan fixes, and no pixel's share is ever stored.
//
// Lanes are pixels, and points of the grid are few: 16 pixels of stride 8 lie between 3 or 4 of them. So the sums of a
// point are neighbours here, not the points of a plane: N planes of N lanes are transposed, and a lane's N items are
// added to its two points at once.
#pragma once

#include "columns.h"
#include "common.h"

namespace coarse {
namespace {

template <class R>
class GradientRows {
  using V = Vec<R>;
  static constexpr int N = kLanes<R>;

 public:
  // Plane p here is plane p % across * (planes / across) + p / across of the field.
  void init(const Field& field, const FieldPlan<R>& plan, int64_t planes, int64_t across, int64_t chunks,
            Arena& arena) {
    plan_ = &plan;
    planes_ = planes;
    across_ = across;
    points_ = field.points();
    one_for_all_ = field.images == 1;
    chunks_ = chunks;
    pitch_ = round_up(plan.rows * planes, N);
    tile_pitch_ = round_up(plan.span, N);
    rows_ = arena.take<R>(tile_pitch_ * pitch_ + N);
    tile_ = arena.take<R>(N * tile_pitch_);
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
    for (; end_ <= last; ++end_)
      for (int64_t point = 0; point < x_count_; ++point)
        memset(rows_ + point * pitch_ + slot(end_), 0, sizeof(R) * static_cast<size_t>(planes_));
  }

  void finish() {
    while (first_ < end_) leave(first_++);
  }

  // Where the planes of row g begin, among `vectors()` of them.
  int64_t slot(int64_t g) const { return g % plan_->rows * planes_; }
  int64_t vectors() const { return plan_->rows * planes_; }

  // Adds vectors [begin, end) of pixels, each of a row and plane, to the points that their lanes read.
  void gather(const Columns<R>& columns, const V* sums, int64_t begin, int64_t end) {
    R* const to = rows_ + (columns.node - x_first_) * pitch_;
    const Columns<R> own = columns;  // a copy, which no store may change
    for (int64_t at = begin; at < end; at += N) {
      V x[N];
      const int64_t count = end - at < N ? end - at : N;
      for (int64_t k = 0; k < count; ++k) x[k] = sums[at + k];
      for (int64_t k = count; k < N; ++k) x[k] = V{};
      transpose<R>(x);
      own.spread(x, [&](int64_t point, V share) {
        R* const sum = to + point * pitch_ + at;
        store(sum, load(sum) + share);
      });
    }
  }

 private:
  // f(plane of the field, its points of row g)
  template <class F>
  void for_each_plane(int64_t g, const F& f) {
    for (int64_t at = 0; at < planes_; at += N) {
      for (int64_t point = 0; point < x_count_; point += N) {
        V x[N];
        for (int64_t k = 0; k < N; ++k) {
          const int64_t own = point + k < x_count_ ? point + k : x_count_ - 1;
          x[k] = load(rows_ + own * pitch_ + slot(g) + at);
        }
        transpose<R>(x);
        for (int64_t k = 0; k < N; ++k) store(tile_ + k * tile_pitch_ + point, x[k]);
      }
      for (int64_t p = at; p < planes_ && p < at + N; ++p)
        f(p % across_ * (planes_ / across_) + p / across_, tile_ + (p - at) * tile_pitch_);
    }
  }

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
    for_each_plane(0, [&](int64_t plane, const R* from) {
      for (int64_t k = 0; k < heads; ++k) leave(heads_ + k * planes_ + plane, from[k]);
      for (int64_t k = heads; k < x_count_; ++k) leave(sum_ + plane * points_ + x_first_ + k, from[k]);
    });
  }

  // weight * row g goes to `unit`, at `offset` in it; in slice `slice` of the grid.
  void add(int64_t g, int64_t unit, int64_t slice, int64_t offset, R weight) {
    const bool head = unit >= head_first_ && unit < head_end_;
    const int64_t w = plan_->x.grid, stride = head ? plan_->unit : points_;
    R* const to =
        head ? heads_ + (unit - head_first_) * planes_ * plan_->unit + offset : sum_ + (slice * plan_->y.grid + g) * w;
    for_each_plane(g, [&](int64_t plane, const R* from) {
      R* const row = to + plane * stride;
      if (adds_) {
        for (int64_t k = 0; k < w; ++k) row[k] += weight * from[k];
      } else {
        for (int64_t k = 0; k < w; ++k) row[k] = weight * from[k];
      }
    });
  }

  const FieldPlan<R>* plan_ = nullptr;
  int64_t planes_ = 0, across_ = 1, points_ = 0, chunks_ = 0, pitch_ = 0, tile_pitch_ = 0;
  bool one_for_all_ = false, adds_ = false;
  R* rows_ = nullptr;  // (points of a chunk, vectors(), padded to whole vectors)
  R* tile_ = nullptr;  // (N, points): N planes on their way out
  R *sum_ = nullptr, *heads_ = nullptr;
  int64_t head_first_ = 0, head_end_ = 0, z_ = 0, first_ = 0, end_ = 0, x_first_ = 0, x_count_ = 0;
};

}  // namespace
}  // namespace coarse
