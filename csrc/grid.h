// A field on a grid of its own, along one axis: which grid points a pixel reads, and which pixels read a grid point. Of
// sizes alone; nothing here knows of torch, of vectors or of a device. In an anonymous namespace for the reason that
// coarse_math.h gives.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace coarse {
namespace {

// Whether pixels read two points. A point for each pixel, and one point for all of them, are read as they are: 0 times
// a neighbour that is -inf would be NaN.
COARSE_HD bool interpolates(int64_t grid, int64_t pixels) { return grid > 1 && grid < pixels; }

// Where pixel `dst` of `out` reads an axis of `in` points: value = (1 - lambda) x[i0] + lambda x[i1]. Exactly the
// linear mode of torch.nn.functional.interpolate with align_corners=False, in its arithmetic (float for float, double
// for double).
template <class R>
struct Tap {
  int64_t i0, i1;
  R lambda;
};

// Where a pixel lies on the axis of grid points; below 0 and beyond in - 1 in the outer half cells.
template <class R>
COARSE_HD R grid_position(int64_t dst, int64_t in, int64_t out) {
  const R scale = static_cast<R>(in) / static_cast<R>(out);
  return scale * (static_cast<R>(dst) + R(0.5)) - R(0.5);
}

template <class R>
COARSE_HD Tap<R> linear_tap(int64_t dst, int64_t in, int64_t out) {
  if (in == out) return {dst, dst, R(0)};
  R source = grid_position<R>(dst, in, out);
  source = source < R(0) ? R(0) : source;
  int64_t i0 = static_cast<int64_t>(source);
  i0 = i0 < in - 1 ? i0 : in - 1;
  R lambda = source - static_cast<R>(i0);
  lambda = lambda < R(0) ? R(0) : lambda > R(1) ? R(1) : lambda;
  return {i0, i0 + (i0 < in - 1 ? 1 : 0), lambda};
}

// The same as a quotient of integers: lambda is known to one rounding wherever on the axis, where the fraction of a
// float coordinate of 500 is known to 3e-5 (and neighbouring logits may be 100 apart). A division of 64 bits, for a
// host. Axes of fewer than 2^31 pixels.
template <class R>
Tap<R> exact_tap(int64_t dst, int64_t in, int64_t out) {
  if (in == out) return {dst, dst, R(0)};
  const int64_t position = (2 * dst + 1) * in - out, unit = 2 * out;
  if (position <= 0) return {0, in > 1 ? 1 : 0, R(0)};
  const int64_t i0 = position / unit;  // at most in - 1: dst is below out
  return {i0, i0 + (i0 < in - 1 ? 1 : 0),
          static_cast<R>(static_cast<double>(position % unit) / static_cast<double>(unit))};
}

// The first pixel of an axis whose position is `cell` or beyond; `out` if there is none. Pixels before first_pixel(0)
// are clamped to grid point 0.
template <class R>
COARSE_HD int64_t first_pixel(int64_t cell, int64_t in, int64_t out) {
  if (in == out) return cell < 0 ? 0 : cell;
  const R scale = static_cast<R>(in) / static_cast<R>(out), edge = static_cast<R>(cell);
  const auto reaches = [&](int64_t dst) { return grid_position<R>(dst, in, out) >= edge; };
  int64_t dst = static_cast<int64_t>((edge + R(0.5)) / scale - R(0.5));
  dst = dst < 0 ? 0 : dst > out ? out : dst;
  while (dst > 0 && reaches(dst - 1)) --dst;
  while (dst < out && !reaches(dst)) ++dst;
  return dst;
}

}  // namespace
}  // namespace coarse
