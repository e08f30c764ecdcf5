// A vector of neighbouring pixels of a row on a grid that is coarser along it: the grid points that its lanes read, and
// what they give back to those points. Points are counted from `node`, the first; there are at most 2 N of them.
#pragma once

#include "simd.h"

namespace coarse {
namespace {

template <class R>
class Columns {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  int64_t node = 0;
  int nodes = 0;  // in reach

  // Pixels [begin, begin + lanes); the lanes beyond read what the last one reads.
  void find(const Axis<R>& x, int64_t begin, int64_t lanes) {
    interpolated_ = x.interpolated;
    lanes_ = static_cast<int>(lanes);
    node = x.i0[begin];
    for (int k = 0; k < N; ++k) {
      const int64_t at = begin + (k < lanes ? k : lanes - 1);
      left_[k] = x.i0[at] - node;
      right_[k] = x.next(at) - node;
      lambda_[k] = x.lambda[at];
    }
    nodes = static_cast<int>(right_[N - 1]) + 1;
  }

  // The lanes' values from those of the points: `low` the first N of them, `high` the next.
  COARSE_HD V read(V low, V high) const {
    const V a = permute<R>(low, high, left_);
    if (!interpolated_) return a;  // 0 times -inf would be NaN
    return (R(1) - lambda_) * a + lambda_ * permute<R>(low, high, right_);
  }
  // The same where N points are all.
  COARSE_HD V read(V low) const {
    const V a = permute_one<R>(low, left_);
    if (!interpolated_) return a;
    return (R(1) - lambda_) * a + lambda_ * permute_one<R>(low, right_);
  }

  // weights[half * N + lane]: what a lane gives to points [half * N, half * N + N), none of it beyond the pixels.
  void weigh(V* weights) const {
    for (int k = 0; k < 2 * N; ++k) weights[k] = broadcast<V>(R(0));
    R* const flat = reinterpret_cast<R*>(weights);
    for (int k = 0; k < lanes_; ++k) {
      const auto give = [&](int64_t point, R share) { flat[(point / N * N + k) * N + point % N] += share; };
      give(left_[k], R(1) - lambda_[k]);
      give(right_[k], lambda_[k]);
    }
  }

 private:
  bool interpolated_ = false;
  int lanes_ = 0;
  I left_{}, right_{};
  V lambda_{};
};

// to[row] += sum over lanes of from[row][lane] * w[lane]: of some rows, what one half of `Columns::weigh` gives to a
// vector of points.
template <class R, int kRows>
COARSE_HD void give(const Vec<R>* w, const R* const (&from)[kRows], R* const (&to)[kRows]) {
  using V = Vec<R>;
  V even[kRows], odd[kRows];
  for (int r = 0; r < kRows; ++r) {
    even[r] = load(to[r]);
    odd[r] = broadcast<V>(R(0));
  }
  for (int k = 0; k < kLanes<R>; k += 2) {
    for (int r = 0; r < kRows; ++r) {
      even[r] += from[r][k] * w[k];
      odd[r] += from[r][k + 1] * w[k + 1];
    }
  }
  for (int r = 0; r < kRows; ++r) store(to[r], even[r] + odd[r]);
}

}  // namespace
}  // namespace coarse
