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

  // weights[point], `nodes` of them: what the lanes take of a point.
  void weigh(V* weights) const {
    for (int n = 0; n < nodes; ++n) {
      const V from_left = select(left_ == n, interpolated_ ? R(1) - lambda_ : broadcast<V>(R(1)), V{});
      weights[n] = from_left + (interpolated_ ? select(right_ == n, lambda_, V{}) : V{});
    }
  }

  // The transpose: x[lane], of N items each, goes to where the lane reads: to(point) += ...
  template <class To>
  COARSE_HD void spread(const V* x, const To& to) const {
    for (int k = 0; k < lanes_;) {
      const auto left = left_[k], right = right_[k];
      V sum{}, below{};
      for (; k < lanes_ && left_[k] == left; ++k) {
        sum += x[k];
        below += lambda_[k] * x[k];
      }
      if (!interpolated_) {
        to(left, sum);
        continue;
      }
      to(left, sum - below);
      to(right, below);
    }
  }

 private:
  bool interpolated_ = false;
  int lanes_ = 0;
  I left_{}, right_{};
  V lambda_{};
};

}  // namespace
}  // namespace coarse
