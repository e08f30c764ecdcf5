// How a problem is cut into tasks: which pixels read which grid points, and who writes what. Of sizes alone, so that
// results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <limits>
#include <vector>

#include "../coarse_math.h"
#include "kernel_set.h"

namespace coarse {
namespace {

constexpr int kRowsPerBand = 32;           // a cell higher than this is cut
constexpr int64_t kMaxChunks = 32;         // of an image: seams that are added up, and threads that it keeps busy
constexpr int64_t kRowsPerChunk = 16;      // at least
constexpr int64_t kPixelsPerChunk = 4096;  // where nothing is interpolated
constexpr int64_t kImagesPerSum = 256;     // summed in R, where copies fit: a thousand times that is 1e-5 off
constexpr int64_t kCopyBytes = int64_t{16} << 20;  // of a gradient that all images share: groups of them have their own
constexpr int64_t kHeadBytes = int64_t{64} << 20;  // of seams, or a quarter of what the gradients themselves take
constexpr int64_t kTransitionBytes = int64_t{32}
                                     << 20;  // of gradients of T, which each slice of the tasks has of its own
constexpr int64_t kMinSlices = 4;            // all the same: threads that are kept busy

// A Plan and what it points into.
template <class R>
class Planned {
 public:
  Plan<R> plan;

  // `problem` has its fields in place (their gradients may be any pointer that is not null). Where nothing is
  // interpolated its images become one row of pixels.
  explicit Planned(Problem<R>& problem) {
    const int64_t size[3] = {problem.depth, problem.height, problem.width};
    axes_.resize(static_cast<size_t>(problem.kind_count) + 1);
    bool flat = describe(plan.seg, problem.seg, size, axes_[0]), any_pixels = false;
    plan.seg.rows = 0;
    for (int k = 0; k < problem.kind_count; ++k) {
      if (problem.kinds[k].field.data == nullptr) continue;
      const bool pixels = describe(plan.kinds[k], problem.kinds[k].field, size, axes_[static_cast<size_t>(k) + 1]);
      if (has_one_matrix(problem.kinds[k].field, pixels)) {
        matrices_.push_back(k);
        continue;
      }
      any_pixels = any_pixels || pixels;
      flat = flat && pixels;
      if (!pixels) strided_.push_back(k);
    }
    const int64_t lanes = kernels_lanes();
    if (flat) {
      problem.width = problem.pixels();
      problem.height = problem.depth = 1;
      // as many vectors as a tile of the pixel grid has, while the class field's share of the cache is small
      plan.per_row = plan.vectors = static_cast<int>(std::clamp<int64_t>(
          (int64_t{96} << 10) / (problem.classes * lanes * static_cast<int64_t>(sizeof(R))), 4, 16));
    } else {
      plan.per_row = strided_.empty() && any_pixels ? kMaxRows : 1;
      plan.vectors = kMaxRows;
    }
    cut_bands(problem);
    plan.groups = groups(problem);
    if (flat && matrices_.empty()) {
      for (int64_t x = 0; x < problem.width; x += kPixelsPerChunk)
        chunks_.push_back(
            {0, 1, x, std::min(x + kPixelsPerChunk, problem.width), 0, static_cast<int32_t>(bands_.size())});
    } else {
      cut_chunks(problem);
    }
    plan.segments = segments_.data();
    plan.bands = bands_.data();
    plan.chunks = chunks_.data();
    plan.chunk_count = static_cast<int64_t>(chunks_.size());
    slopes_.resize(strided_.size());
    for (size_t n = 0; n < strided_.size(); ++n) find_slopes(plan.kinds[strided_[n]], slopes_[n]);
    plan.slices = plan.tasks();
  }
  // Tasks have a gradient of `learned` matrices T, C x C doubles each.
  void learn_transitions(int64_t learned, int64_t classes) {
    const int64_t bytes = learned * classes * classes * static_cast<int64_t>(sizeof(double));
    if (bytes > 0) plan.slices = std::min(plan.tasks(), std::max(kMinSlices, kTransitionBytes / bytes));
  }
  Planned(const Planned&) = delete;

 private:
  struct Points {
    std::array<std::vector<int32_t>, 3> points;
    std::array<std::vector<R>, 3> lambdas;
  };
  struct Heads {
    std::vector<int32_t> first, count, x_first, x_count;
  };

  static int64_t kernels_lanes() { return sizeof(R) == 4 ? kernels().simd_bytes / 4 : 2; }

  static Axis<R> describe_axis(int64_t grid, int64_t pixels, std::vector<int32_t>& points, std::vector<R>& lambdas) {
    points.resize(pixels);
    lambdas.resize(pixels);
    const bool interpolated = interpolates(grid, pixels);
    for (int64_t k = 0; k < pixels; ++k) {
      const Tap<R> tap = exact_tap<R>(k, grid, pixels);
      points[k] = static_cast<int32_t>(tap.i0);
      lambdas[k] = interpolated ? tap.lambda : R(0);
    }
    return {grid, interpolated, points.data(), lambdas.data()};
  }

  // Returns whether the field is on the pixels.
  static bool describe(FieldPlan<R>& to, const Field& field, const int64_t* size, Points& own) {
    to.on_pixels = std::equal(size, size + 3, field.grid);
    to.volume = size[0] > 1;
    to.line = size[0] == 1 && size[1] == 1;
    if (to.on_pixels) return true;
    Axis<R>* const axes[3] = {&to.z, &to.y, &to.x};
    for (int axis = 0; axis < 3; ++axis)
      *axes[axis] = describe_axis(field.grid[axis], size[axis], own.points[axis], own.lambdas[axis]);
    to.unit = to.volume ? field.grid[1] * field.grid[2] : to.line ? 1 : field.grid[2];
    return false;
  }

  // Bands: rows in which no field with matrices changes its cell; in them segments, of 8, 4, 2 or 1 rows.
  void cut_bands(const Problem<R>& problem) {
    const auto height = static_cast<int32_t>(problem.height);
    for (int32_t y0 = 0; y0 < height;) {
      int32_t y1 = y0 + 1;
      const int32_t most = strided_.empty() ? kMaxRows : kRowsPerBand;
      while (y1 < height && y1 - y0 < most && same_cell(y0, y1)) ++y1;
      const auto begin = static_cast<int32_t>(segments_.size());
      cut_segments(y0, y1);
      bands_.push_back({y0, y1, begin, static_cast<int32_t>(segments_.size())});
      plan.most_segments = std::max(plan.most_segments, static_cast<int>(segments_.size()) - begin);
      y0 = y1;
    }
    if (!plan.seg.on_pixels) {
      for (const Band& band : bands_)
        plan.seg.rows =
            std::max(plan.seg.rows, static_cast<int>(plan.seg.y.next(band.y1 - 1) - plan.seg.y.i0[band.y0]) + 1);
    }
    for (int k : strided_) plan.kinds[k].rows = plan.kinds[k].y.interpolated ? 2 : 1;
  }

  bool same_cell(int32_t y0, int32_t y1) const {
    return std::all_of(strided_.begin(), strided_.end(),
                       [&](int k) { return plan.kinds[k].y.i0[y0] == plan.kinds[k].y.i0[y1]; });
  }

  // Runs of rows along which every lambda grows evenly (it is clamped to 0 above the first grid point).
  void cut_segments(int32_t y0, int32_t y1) {
    while (y0 < y1) {
      int32_t rows = plan.per_row > 1 ? 1 : std::min<int32_t>(kMaxRows, y1 - y0);
      for (int k : strided_) rows = std::min(rows, even_rows(plan.kinds[k].y, y0, rows));
      while ((rows & (rows - 1)) != 0) rows &= rows - 1;  // down to a power of two
      segments_.push_back({y0, rows});
      y0 += rows;
    }
  }

  static int32_t even_rows(const Axis<R>& axis, int32_t y0, int32_t most) {
    // each lambda is rounded once, and the step is a difference of two
    const R tolerance = R(2) * std::numeric_limits<R>::epsilon() * static_cast<R>(most);
    const R step = most > 1 ? axis.lambda[y0 + 1] - axis.lambda[y0] : R(0);
    int32_t rows = 1;
    while (rows < most &&
           std::abs(axis.lambda[y0 + rows] - axis.lambda[y0] - static_cast<R>(rows) * step) <= tolerance) {
      ++rows;
    }
    return rows;
  }

  void find_slopes(FieldPlan<R>& field, std::vector<Slope<R>>& slopes) const {
    for (const Segment& s : segments_) {
      const R first = field.y.lambda[s.y0];
      // from end to end: one difference of neighbours would carry its rounding error `rows` times
      const R even = s.rows > 1 ? (field.y.lambda[s.y0 + s.rows - 1] - first) / static_cast<R>(s.rows - 1) : R(0);
      slopes.push_back({first, even});
    }
    field.slopes = slopes.data();
  }

  // Chunks, as many as may be useful, and fewer where their seams take too much: those of large fields with few rows
  // are a good part of the gradient, and every image has its own.
  void cut_chunks(const Problem<R>& problem) {
    for (int64_t most = kMaxChunks;; most /= 2) {
      chunks_.clear();
      heads_.clear();
      if (problem.depth > 1) {
        cut_slices(problem, most);
      } else {
        problem.height > 1 ? cut_rows(problem, most) : cut_columns(problem, most);
      }
      int64_t seams = 0, gradients = 0;
      const auto find = [&](FieldPlan<R>& field, const Field& tensor, int64_t planes) {
        if (field.on_pixels) return;
        find_heads(field, problem, heads_.emplace_back());
        if (tensor.gradient == nullptr) return;
        const int64_t owners = tensor.images == 1 ? plan.groups : tensor.images;
        const int64_t chunks = static_cast<int64_t>(chunks_.size()), bytes = planes * static_cast<int64_t>(sizeof(R));
        seams += owners * chunks * field.head_slots * field.unit * bytes;
        gradients += tensor.images * tensor.points() * bytes;
      };
      find(plan.seg, problem.seg, problem.classes);
      for (int k : strided_)
        find(plan.kinds[k], problem.kinds[k].field, static_cast<int64_t>(problem.classes) * problem.classes);
      // sums of the tasks in the place of seams
      for (int k : matrices_) {
        const Drawings<R>& kind = problem.kinds[k];
        if (kind.field.gradient == nullptr && kind.transition == nullptr) continue;
        const int64_t owners = kind.field.images == 1 ? plan.groups : kind.field.images;
        const int64_t bytes = static_cast<int64_t>(problem.classes) * problem.classes * sizeof(double);
        seams += owners * static_cast<int64_t>(chunks_.size()) * bytes * (kind.transition == nullptr ? 1 : 2);
      }
      if (most == 1 || seams <= std::max(kHeadBytes, gradients / 4)) return;
    }
  }

  // Of a volume runs of slices.
  void cut_slices(const Problem<R>& problem, int64_t most) {
    const int64_t slices = (problem.depth + most - 1) / most;
    for (int64_t z = 0; z < problem.depth; z += slices)
      chunks_.push_back(
          {z, std::min(z + slices, problem.depth), 0, problem.width, 0, static_cast<int32_t>(bands_.size())});
  }

  // Of a line runs of pixels, in whole vectors.
  void cut_columns(const Problem<R>& problem, int64_t most) {
    const int64_t pixels = std::max(kPixelsPerChunk, ((problem.width + most - 1) / most + 63) / 64 * 64);
    for (int64_t x = 0; x < problem.width; x += pixels)
      chunks_.push_back({0, 1, x, std::min(x + pixels, problem.width), 0, static_cast<int32_t>(bands_.size())});
  }

  // Runs of bands. They begin where the largest field's cells do, so that a seam is one row.
  void cut_rows(const Problem<R>& problem, int64_t most) {
    const auto bands = static_cast<int32_t>(bands_.size());
    int largest = -1;
    for (int k : strided_) {
      if (largest < 0 || problem.kinds[k].field.points() > problem.kinds[largest].field.points()) largest = k;
    }
    const int64_t rows = std::max(kRowsPerChunk, (problem.height + most - 1) / most);
    int32_t begin = 0;
    for (int32_t b = 1; b <= bands; ++b) {
      const bool end = b == bands;
      if (!end) {
        if (bands_[b].y0 - bands_[begin].y0 < rows) continue;
        const bool cut = bands_[b].y0 - bands_[b - 1].y0 == kRowsPerBand;  // a large cell is cut anywhere
        if (largest >= 0 && !cut) {
          const Axis<R>& y = plan.kinds[largest].y;
          if (y.i0[bands_[b].y0] == y.i0[bands_[b].y0 - 1]) continue;
        }
      }
      chunks_.push_back({0, 1, 0, problem.width, begin, b});
      begin = b;
    }
  }

  // The units that a chunk has in common with those before it, and the points of a row that it works on.
  void find_heads(FieldPlan<R>& field, const Problem<R>& problem, Heads& heads) const {
    const Axis<R>& outer = field.volume ? field.z : field.line ? field.x : field.y;
    field.head_slots = field.span = 0;
    for (size_t n = 0; n < chunks_.size(); ++n) {
      const Chunk& chunk = chunks_[n];
      const int64_t at = field.volume ? chunk.z0 : field.line ? chunk.x0 : bands_[static_cast<size_t>(chunk.begin)].y0;
      const int32_t first = outer.i0[at];
      const int64_t count = n == 0 ? 0 : std::max<int64_t>(0, outer.next(at - 1) - first + 1);
      heads.first.push_back(first);
      heads.count.push_back(static_cast<int32_t>(count));
      field.head_slots = std::max(field.head_slots, count);
      const int64_t left = chunk.x0 == 0 ? 0 : field.x.i0[chunk.x0];
      const int64_t right = chunk.x1 == problem.width ? field.x.grid : field.x.next(chunk.x1 - 1) + 1;
      heads.x_first.push_back(static_cast<int32_t>(left));
      heads.x_count.push_back(static_cast<int32_t>(right - left));
      field.span = std::max(field.span, right - left);
    }
    field.head_first = heads.first.data();
    field.head_count = heads.count.data();
    field.x_first = heads.x_first.data();
    field.x_count = heads.x_count.data();
    field.zeroed = field.volume;
  }

  // Every image is a group of its own, but where images share a field whose gradient is wanted: each group has a copy
  // of that.
  int64_t groups(const Problem<R>& problem) const {
    int64_t groups = problem.batch;
    for (int k = 0; k < problem.kind_count; ++k) {
      const Field& field = problem.kinds[k].field;
      if (field.gradient == nullptr || field.images != 1 || problem.batch <= 1) continue;
      const int64_t bytes =
          static_cast<int64_t>(problem.classes) * problem.classes * field.points() * static_cast<int64_t>(sizeof(R));
      const int64_t wanted =
          std::max<int64_t>(plan.kinds[k].on_pixels ? 1 : 16, (problem.batch - 1) / kImagesPerSum + 1);
      groups = std::min(groups, std::clamp<int64_t>(kCopyBytes / std::max<int64_t>(bytes, 1), 1, wanted));
    }
    return std::max<int64_t>(groups, 1);
  }

  std::vector<Points> axes_;
  std::vector<int> strided_;   // kinds with a field on a grid of its own
  std::vector<int> matrices_;  // kinds with one matrix for all pixels of an image
  std::vector<Segment> segments_;
  std::vector<Band> bands_;
  std::vector<Chunk> chunks_;
  std::vector<std::vector<Slope<R>>> slopes_;
  std::deque<Heads> heads_;  // what they hold is pointed at
};

}  // namespace
}  // namespace coarse
