// The class logits of a pixel, interpolated where they have a grid of their own: along x, then y, then z, as torch
// does.
#pragma once

#include "device.h"

namespace coarse {
namespace {

template <class R>
struct Between {  // two neighbouring points of an axis
  R lambda;
  bool same;
  // Which product is rounded is said here: left to the compiler, classes with equal logits in two copies of a loop
  // would not be equal between the points, and the first of equals not the label.
  __device__ __forceinline__ R operator()(R a, R b) const { return same ? a : fma(lambda, b, (R(1) - lambda) * a); }
};

// The points of a plane that a pixel reads.
template <class R>
struct Corners {
  int at[4], slice;  // from the plane's first point; `slice`: to the next one along z
  Between<R> z, y, x;

  __device__ __forceinline__ Corners(const int (&grid)[3], int depth, int height, int width, int pixel) {
    const unsigned row = static_cast<unsigned>(pixel) / static_cast<unsigned>(width);
    const Tap<R> tz = linear_tap<R>(row / static_cast<unsigned>(height), grid[0], depth);
    const Tap<R> ty = linear_tap<R>(row % static_cast<unsigned>(height), grid[1], height);
    const Tap<R> tx = linear_tap<R>(pixel - row * static_cast<unsigned>(width), grid[2], width);
    const int across = grid[2], area = grid[1] * across;
    const int corner = static_cast<int>(tz.i0) * area, upper = static_cast<int>(ty.i0) * across,
              lower = static_cast<int>(ty.i1) * across;
    at[0] = corner + upper + static_cast<int>(tx.i0);
    at[1] = corner + upper + static_cast<int>(tx.i1);
    at[2] = corner + lower + static_cast<int>(tx.i0);
    at[3] = corner + lower + static_cast<int>(tx.i1);
    slice = static_cast<int>(tz.i1 - tz.i0) * area;
    z = {tz.lambda, tz.i0 == tz.i1};
    y = {ty.lambda, ty.i0 == ty.i1};
    x = {tx.lambda, tx.i0 == tx.i1};
  }

  // load(k): point k of the plane.
  template <class Load>
  __device__ __forceinline__ R interpolate(const Load& load) const {
    const auto flat = [&](int at_z) {
      return y(x(load(at_z + at[0]), load(at_z + at[1])), x(load(at_z + at[2]), load(at_z + at[3])));
    };
    const R front = flat(0);
    return z.same ? front : z(front, flat(slice));
  }
};

// s[j] of one pixel of a layer; storage and grid known at run time only.
template <class R>
struct ClassLogits {
  const Layer<R>& s;
  int64_t first;  // of this image's class logits; of the pixel's, where they are on the pixel grid
  Corners<R> corners;

  __device__ __forceinline__ ClassLogits(const Layer<R>& layer, int64_t image, int64_t pixel)
      : s(layer),
        first(image * layer.classes * layer.seg_points() + (layer.seg_on_pixels ? pixel : 0)),
        corners(layer.seg_grid, static_cast<int>(layer.depth), static_cast<int>(layer.height),
                static_cast<int>(layer.width), static_cast<int>(pixel)) {}

  __device__ __forceinline__ R operator()(int j) const {
    const int64_t plane = first + j * s.seg_points();
    if (s.seg_on_pixels) return load_as<R>(s.seg_logits, s.seg_storage, plane);
    return corners.interpolate([&](int k) { return load_as<R>(s.seg_logits, s.seg_storage, plane + k); });
  }
};

}  // namespace
}  // namespace coarse
