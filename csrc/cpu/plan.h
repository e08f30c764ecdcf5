// How a strided grid is cut into tasks: which pixels read which grid points, and what may run at the same time.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../coarse_math.h"
#include "problem.h"

namespace coarse {

struct StridedTask {
  Band band;
  int64_t z, b0, b1;
};

template <class R>
struct StridedPlan {
  StridedGrid<R> grid;
  int64_t copies = 1;  // of the gradient: bands that share grid rows and run at the same time have their own
  std::vector<StridedTask> tasks;              // in order; tasks of one phase run at the same time
  std::vector<int64_t> phases;                 // begin of each phase, and the end
  std::array<std::vector<int32_t>, 3> points;  // what `grid` points into
  std::array<std::vector<R>, 3> lambdas;
  std::vector<RowSegment<R>> segments;
};

namespace {

constexpr int kRowsPerBand = 64;    // a cell higher than this is shared between tasks
constexpr int kMaxCopies = 16;      // of a gradient that is small then: its grid has few points per image
constexpr int64_t kEnoughRows = 8;  // grid rows that keep the threads busy without further cuts

template <class R>
Axis<R> plan_axis(int64_t grid, int64_t pixels, std::vector<int32_t>& points, std::vector<R>& lambdas) {
  points.resize(pixels);
  lambdas.resize(pixels);
  const bool interpolated = grid > 1 && grid < pixels;
  for (int64_t k = 0; k < pixels; ++k) {
    const Tap<R> tap = linear_tap<R>(k, grid, pixels);
    points[k] = static_cast<int32_t>(tap.i0);
    lambdas[k] = interpolated ? tap.lambda : R(0);
  }
  return {grid, interpolated, points.data(), lambdas.data()};
}

// Rows [y0, y1) of one cell, in runs along which lambda grows evenly (it is clamped to 0 above the first grid point),
// of 8, 4, 2 or 1 rows.
template <class R>
void cut_rows(const Axis<R>& axis, int32_t y0, int32_t y1, std::vector<RowSegment<R>>& segments) {
  // lambda is the fraction of a coordinate: that is how exactly it can be known
  const R tolerance = R(8) * std::numeric_limits<R>::epsilon() * static_cast<R>(axis.i0[y0] + 2);
  while (y0 < y1) {
    const R step = y0 + 1 < y1 ? axis.lambda[y0 + 1] - axis.lambda[y0] : R(0);
    int32_t rows = 1;
    while (rows < kMaxRows && y0 + rows < y1 &&
           std::abs(axis.lambda[y0 + rows] - axis.lambda[y0] - static_cast<R>(rows) * step) <= tolerance) {
      ++rows;
    }
    while ((rows & (rows - 1)) != 0) rows &= rows - 1;  // down to a power of two
    // from end to end: one difference of neighbours would carry its rounding error `rows` times
    const R even = rows > 1 ? (axis.lambda[y0 + rows - 1] - axis.lambda[y0]) / static_cast<R>(rows - 1) : R(0);
    segments.push_back({y0, rows, axis.lambda[y0], even});
    y0 += rows;
  }
}

template <class R>
StridedPlan<R> plan_strided(const Stream<R>& s, const std::array<int64_t, 3>& grid) {
  StridedPlan<R> plan;
  plan.grid.z = plan_axis<R>(grid[0], s.depth, plan.points[0], plan.lambdas[0]);
  plan.grid.y = plan_axis<R>(grid[1], s.height, plan.points[1], plan.lambdas[1]);
  plan.grid.x = plan_axis<R>(grid[2], s.width, plan.points[2], plan.lambdas[2]);

  // bands: the rows of one grid cell, at most kMaxCopies of them a cell
  std::vector<Band> bands;
  int32_t bands_a_cell = 1;
  const int32_t height = static_cast<int32_t>(s.height);
  for (int32_t y0 = 0; y0 < height;) {
    int32_t y1 = y0;
    while (y1 < height && plan.points[1][y1] == plan.points[1][y0]) ++y1;
    const int32_t rows = std::max(kRowsPerBand, (y1 - y0 + kMaxCopies - 1) / kMaxCopies);
    int32_t copy = 0;
    for (int32_t y = y0; y < y1; y += rows, ++copy) {
      const int32_t begin = static_cast<int32_t>(plan.segments.size());
      cut_rows(plan.grid.y, y, std::min(y + rows, y1), plan.segments);
      bands.push_back({plan.points[1][y0], begin, static_cast<int32_t>(plan.segments.size()), copy});
    }
    bands_a_cell = std::max(bands_a_cell, copy);
    y0 = y1;
  }
  plan.grid.segments = plan.segments.data();

  // Images: each its own gradient, so each its own task; of one field for all, a few groups where there are few bands.
  const bool shared = s.cm_batch == 1 && s.batch > 1;
  int64_t groups = s.batch;
  if (shared) groups = grid[1] >= kEnoughRows ? 1 : std::min<int64_t>(s.batch, std::max(1, kMaxCopies / bands_a_cell));
  plan.copies = bands_a_cell * (shared ? groups : 1);

  // Neighbouring cells add to the grid row between them, so even cells go before odd ones; slices of a volume share
  // grid slices, so they go one after the other.
  plan.phases.push_back(0);
  for (int64_t z = 0; z < s.depth; ++z) {
    for (int colour = 0; colour < 2; ++colour) {
      for (int64_t group = 0; group < groups; ++group) {
        for (Band band : bands) {
          if (band.cell % 2 != colour) continue;
          if (shared) band.copy += static_cast<int32_t>(group) * bands_a_cell;
          plan.tasks.push_back({band, z, s.batch * group / groups, s.batch * (group + 1) / groups});
        }
      }
      plan.phases.push_back(static_cast<int64_t>(plan.tasks.size()));
    }
  }
  return plan;
}

}  // namespace
}  // namespace coarse
