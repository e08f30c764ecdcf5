// What the pixel-grid and the strided-grid kernels share: workspace, labels of a run of pixels, the log-space path.
#pragma once

#include "simd.h"

namespace coarse {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Hands out aligned pieces of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class X>
  X* take(int64_t n) {
    X* piece = base_ == nullptr ? nullptr : reinterpret_cast<X*>(base_ + used_);
    used_ += round_up(n * static_cast<int64_t>(sizeof(X)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Labels, weights and the label's row of T for a run of pixels: the part that both grids share.
template <class R>
struct LabelRun {
  int32_t* label;  // 0 where ignored, so that a lane without label computes something harmless
  R* valid;        // 1 or 0
  R* weight;       // class_weight[label] * pixel_weight, 0 where ignored
  bool any_valid, all_valid;

  void take(Arena& arena, int64_t n) {
    label = arena.take<int32_t>(n);
    valid = arena.take<R>(n);
    weight = arena.take<R>(n);
  }

  // Pixels [at, at + n) of the flattened (B, D, H, W) label map; lanes up to `padded` count as ignored.
  // `valid` and `weight` are written from position `to` on, so that a row of a segment can have its place.
  inline bool read(const Stream<R>& s, int64_t at, int64_t n, int64_t padded, int64_t to) {
    bool bad = false;
    int64_t count = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t y = s.label_type == LabelType::u8 ? static_cast<const uint8_t*>(s.labels)[at + k]
                                                      : static_cast<const int64_t*>(s.labels)[at + k];
      bool ok = y != s.ignore_index;
      if (ok && (y < 0 || y >= s.classes)) {
        bad = true;
        ok = false;
      }
      count += ok;
      label[to + k] = ok ? static_cast<int32_t>(y) : 0;
      valid[to + k] = ok ? R(1) : R(0);
      weight[to + k] = valid[to + k];
    }
    for (int64_t k = n; k < padded; ++k) {
      label[to + k] = 0;
      valid[to + k] = weight[to + k] = R(0);
    }
    // Not products: the weight of an ignored pixel, or of a class that nobody drew, may be inf or NaN.
    if (s.class_weight != nullptr) {
      for (int64_t k = 0; k < n; ++k) weight[to + k] = valid[to + k] != R(0) ? s.class_weight[label[to + k]] : R(0);
    }
    if (s.pixel_weight != nullptr) {
      for (int64_t k = 0; k < n; ++k)
        weight[to + k] = valid[to + k] != R(0) ? weight[to + k] * s.pixel_weight[at + k] : R(0);
    }
    any_valid = any_valid || count > 0;
    all_valid = all_valid && count == n;
    return bad;
  }
};

// reported[i][k] = T[i, y(k)] for k in [0, n); rows `stride` apart.
template <class R>
inline void report_run(const R* transition, int classes, const int32_t* label, int64_t n, R* reported, int64_t stride) {
  for (int i = 0; i < classes; ++i) {
    R* row = reported + i * stride;
    if (transition == nullptr) {
      for (int64_t k = 0; k < n; ++k) row[k] = label[k] == i ? R(1) : R(0);
    } else {
      const R* t = transition + static_cast<int64_t>(i) * classes;
      for (int64_t k = 0; k < n; ++k) row[k] = t[label[k]];
    }
  }
}

// One vector of pixels in log space: the slow path of both grids. `a` holds the logits and leaves with the gradient.
template <class R>
struct LogSpace {
  using V = Vec<R>;
  V *s, *a, *p, *r, *reported;
  Reported<V>* t;
  ColumnTerms<V>* columns;

  void take(Arena& arena, int64_t classes) {
    s = arena.take<V>(classes);
    a = arena.take<V>(classes * classes);
    t = arena.take<Reported<V>>(classes);
    p = arena.take<V>(classes);
    r = arena.take<V>(classes);
    columns = arena.take<ColumnTerms<V>>(classes);
    reported = arena.take<V>(classes);
  }

  inline PixelTerms<V> run(int classes, const R* transition, const int32_t* label, V weight, V trace_weight,
                           bool want_reported) {
    for (int i = 0; i < classes; ++i) {
      for (int k = 0; k < kLanes<R>; ++k) {
        const R own = transition != nullptr ? transition[i * classes + label[k]] : label[k] == i ? R(1) : R(0);
        t[i].t[k] = own;
        t[i].log_t[k] = std::log(own);  // of the C library: T may hold subnormals
      }
    }
    return pixel_log_space<V>(classes, s, a, t, weight, trace_weight, p, r, columns,
                              want_reported ? reported : nullptr);
  }

  // sum += the gradient of T: lane k belongs to column label[k]
  inline void add_reported(int classes, const int32_t* label, double* sum) const {
    for (int i = 0; i < classes; ++i)
      for (int k = 0; k < kLanes<R>; ++k) sum[i * classes + label[k]] += static_cast<double>(reported[i][k]);
  }
};

}  // namespace
}  // namespace coarse
