// What the kernels of a kind of drawings share: workspace, the pixels they work on, labels, the log-space path.
#pragma once

#include <new>

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

// The pixels that are worked on together: vectors of neighbouring pixels of a row, `per_row` of each of `rows` rows.
// Vector v is number v % per_row of row v / per_row. What belongs to it lies in memory as V x[plane * pitch + v].
struct Slab {
  int64_t image, z, y0, x0, x1;  // rows from y0 on, columns [x0, x1)
  int rows, per_row;
  int32_t segment;  // of the plan: where the fields' lambdas are
  int pitch;

  int count() const { return rows * per_row; }
};

// Where a vector of a slab lies in its image.
struct Place {
  int v;
  int64_t at;     // of the first pixel
  int64_t lanes;  // pixels that exist: at least 1
};

// f(place) for every vector. Two loops: a division for each vector would show.
template <class R, class F>
COARSE_HD void for_each_vector(const Problem<R>& problem, const Slab& slab, const F& f) {
  constexpr int64_t N = kLanes<R>;
  int v = 0;
  for (int r = 0; r < slab.rows; ++r) {
    const int64_t row = (slab.z * problem.height + slab.y0 + r) * problem.width;
    for (int m = 0; m < slab.per_row; ++m, ++v) {
      const int64_t x = slab.x0 + m * N;
      f(Place{v, row + x, slab.x1 - x < N ? slab.x1 - x : N});
    }
  }
}

// The label of all of n pixels that have one, -1 where there are several. Drawings are coherent: mostly it is one.
template <class R>
inline int32_t common_label(const int32_t* label, const R* valid, int64_t n) {
  int32_t most = 0;
  for (int64_t k = 0; k < n; ++k) most = label[k] > most ? label[k] : most;
  int64_t others = 0;
  for (int64_t k = 0; k < n; ++k) others += (label[k] != most) & (valid[k] != R(0));
  return others == 0 ? most : -1;
}

// Labels and weights of the vectors of a slab in one layer of drawings.
template <class R>
struct LabelRun {
  static constexpr int N = kLanes<R>;

  int32_t* label;  // 0 where ignored, so that a lane without label computes something harmless
  R* valid;        // 1 or 0
  R* weight;       // class_weight[label] * pixel_weight, 0 where ignored
  bool any_valid, all_valid;
  int32_t common;  // `common_label` of them all

  // Pixels [at, at + n) of the flattened label maps; lanes up to `padded` count as ignored. Written from position `to`
  // on.
  inline bool read(const Problem<R>& problem, const Drawings<R>& kind, int64_t at, int64_t n, int64_t padded,
                   int64_t to) {
    int64_t count = 0, bad = 0;
    int32_t* const to_label = label + to;
    R *const to_valid = valid + to, *const to_weight = weight + to;
    // In locals, without a branch and mostly of a length that is known, for the compiler to make vectors of it.
    const auto scan = [&](const auto* y, auto ignore, auto classes) {
      int32_t counted = 0, wrong = 0;
      const auto one = [&](int64_t k) {
        const decltype(ignore) own = y[k];
        const bool used = own != ignore, fits = (own >= 0) & (own < classes), ok = used & fits;
        counted += ok;
        wrong += used & !fits;
        to_label[k] = ok ? static_cast<int32_t>(own) : 0;
        to_valid[k] = to_weight[k] = ok ? R(1) : R(0);
      };
      int64_t k = 0;
      for (; k + N <= n; k += N)
        for (int lane = 0; lane < N; ++lane) one(k + lane);
      for (; k < n; ++k) one(k);
      count = counted;
      bad = wrong;
    };
    if (kind.label_type == LabelType::u8) {
      const int64_t ignore = problem.ignore_index;
      scan(static_cast<const uint8_t*>(kind.labels) + at,
           ignore < 0 || ignore > 255 ? int32_t{-1} : static_cast<int32_t>(ignore), problem.classes);
    } else {
      scan(static_cast<const int64_t*>(kind.labels) + at, problem.ignore_index, static_cast<int64_t>(problem.classes));
    }
    for (int64_t k = n; k < padded; ++k) {
      label[to + k] = 0;
      valid[to + k] = weight[to + k] = R(0);
    }
    // Not products: the weight of an ignored pixel, or of a class that nobody drew, may be inf or NaN.
    if (kind.class_weight != nullptr) {
      for (int64_t k = 0; k < n; ++k) weight[to + k] = valid[to + k] != R(0) ? kind.class_weight[label[to + k]] : R(0);
    }
    if (kind.pixel_weight != nullptr) {
      for (int64_t k = 0; k < n; ++k)
        weight[to + k] = valid[to + k] != R(0) ? weight[to + k] * kind.pixel_weight[at + k] : R(0);
    }
    any_valid = any_valid || count > 0;
    all_valid = all_valid && count == n;
    return bad != 0;
  }

  // `common`, of n positions.
  void find_common(int64_t n) { common = common_label(label, valid, n); }

  // The same of vector v.
  int32_t one_label(int v) const { return common >= 0 ? common : common_label(label + v * N, valid + v * N, N); }
};

// Where a task adds what it has of one kind of drawings.
struct Sums {
  CompensatedSum* terms;  // nll, trace
  double* transition;     // (C, C), the gradient of T; null: not wanted
};

// Loss terms of one kind of drawings: vector by vector into its maps, and, slab by slab, into the sums of the task. A
// slab of many layers has many vectors, and R holds the sum of few.
template <class R>
class Terms {
  using V = Vec<R>;

 public:
  // A weight of 0 counts for nothing, whatever nll is. `at`: of the first pixel in the maps.
  COARSE_HD void add(const Drawings<R>& kind, int64_t at, int64_t lanes, V weight, V nll, V trace) {
    const V zero = broadcast<V>(R(0));
    nll = select(weight == zero, zero, weight * nll);  // 0 * inf is not 0
    trace = select(weight == zero, zero, weight * trace);
    nll_ += nll;
    trace_ += trace;
    if (++held_ == kHeld) fold();
    if (kind.nll_map == nullptr) return;
    for (int64_t k = 0; k < lanes; ++k) {
      kind.nll_map[at + k] = nll[k];
      kind.trace_map[at + k] = trace[k];
    }
  }
  void leave(const Sums& sums) {
    fold();
    for (int k = 0; k < 2; ++k) {
      sums.terms[k].add(folded_[k]);
      folded_[k] = {};
    }
  }

 private:
  static constexpr int kHeld = 16;  // no slab of one layer has more

  void fold() {
    folded_[0].add(sum_lanes<R>(nll_));
    folded_[1].add(sum_lanes<R>(trace_));
    nll_ = trace_ = V{};
    held_ = 0;
  }

  V nll_{}, trace_{};
  int held_ = 0;
  CompensatedSum folded_[2];
};

// Zeros in the maps of a layer.
template <class R>
inline void zero_maps(const Problem<R>& problem, const Drawings<R>& kind, const Slab& slab, int64_t layer) {
  if (kind.nll_map == nullptr) return;
  const int64_t map = (slab.image * kind.layers + layer) * problem.pixels();
  for_each_vector(problem, slab, [&](const Place& place) {
    for (int64_t k = 0; k < place.lanes; ++k)
      kind.nll_map[map + place.at + k] = kind.trace_map[map + place.at + k] = R(0);
  });
}

// f(labels, place) for every vector of every layer that has labels; `place` is in the layer's map. Zeros in the maps of
// the others.
template <class R, class F>
COARSE_HD void for_each_labelled(const Problem<R>& problem, const Drawings<R>& kind, const Slab& slab,
                                 const LabelRun<R>* layers, const F& f) {
  for (int64_t layer = 0; layer < kind.layers; ++layer) {
    const LabelRun<R>& labels = layers[layer];
    if (!labels.any_valid) {
      if (problem.posterior == nullptr) zero_maps(problem, kind, slab, layer);
      continue;
    }
    const int64_t map = (slab.image * kind.layers + layer) * problem.pixels();
    for_each_vector(problem, slab, [&](Place place) {
      place.at += map;
      f(labels, place);
    });
  }
}

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
