// CM logits of one point: one matrix for all pixels of an image. A pixel looks up the column of its label in tables
// that are formed once an image (matrices.h), so that it costs what a trusted one costs:
//
//   D = sum_j p[j] q[j,y], nll = -log D,  r[j] = p[j] q[j,y] / D;   in log space where D is small
//
// Of the gradients of the matrix and of T it leaves sums over all pixels with label y,
//
//   S[y,j] += w r[j],   U[j,y] += w p[j] / D,   L += w,
//
// of which those gradients are formed once an image. Lanes sum w p / D for themselves, in vectors of their own for each
// label; every kRun vectors, before float32 is felt, they join the doubles of the task, S times q.
#pragma once

#include "by_label.h"
#include "class_field.h"

namespace coarse {
namespace {

template <class R>
class OneMatrix {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;
  static constexpr int kRun = 128;

 public:
  void init(const Problem<R>& problem, const Plan<R>& plan, int index, Arena& arena) {
    problem_ = &problem;
    kind_ = &problem.kinds[index];
    matrices_ = &plan.matrices[index];
    chunks_ = plan.chunk_count;
    want_sums_ = matrices_->counts != nullptr;
    want_own_ = problem.seg.gradient != nullptr;
    const int64_t c = problem.classes;
    q_.init(problem.classes, arena);
    log_q_.init(problem.classes, arena);
    share_ = arena.take<V>(c);
    sums_ = want_sums_ ? arena.take<V>(c * c) : nullptr;
    touched_ = arena.take<bool>(c);
    seen_ = arena.take<int64_t>(c);
  }

  // With the workspace in place.
  void begin() {
    image_ = -1;
    run_ = 0;
    counts_ = nullptr;
    const int64_t c = problem_->classes;
    memset(touched_, 0, static_cast<size_t>(c));
    memset(seen_, 0, sizeof(int64_t) * static_cast<size_t>(c));
    if (want_sums_) memset(static_cast<void*>(sums_), 0, sizeof(V) * static_cast<size_t>(c * c));
  }

  void start(int64_t image, int64_t group, int64_t chunk) {
    const bool one_for_all = kind_->field.images == 1;
    if (image_ >= 0 && (one_for_all || image == image_)) return;
    leave();
    image_ = image;
    const int64_t c = problem_->classes, own = one_for_all ? 0 : image;
    if (want_sums_) counts_ = matrices_->counts + ((one_for_all ? group : image) * chunks_ + chunk) * matrices_->slot;
    q_.set(matrices_->q + own * c * c);
    log_q_.set(matrices_->log_q + own * c * c);
    log_a_ = matrices_->log_a == nullptr ? nullptr : matrices_->log_a + own * c * c;
    trace_ = matrices_->trace[own];
  }

  void finish() { leave(); }

  void run(ClassField<R>& field, const Slab& slab, const LabelRun<R>* layers, const Sums& sums) {
    for_each_labelled(*problem_, *kind_, slab, layers, [&](const LabelRun<R>& labels, const Place& place) {
      vector(field, slab.pitch, labels, place, sums);
    });
    terms_.leave(sums);
  }

 private:
  void vector(ClassField<R>& field, int pitch, const LabelRun<R>& labels, const Place& place, const Sums& sums) {
    const int c = problem_->classes, v = place.v;
    const V zero = broadcast<V>(R(0)), one = broadcast<V>(R(1));
    const int32_t* const label = labels.label + v * N;
    const V valid = load(labels.valid + v * N), weight = load(labels.weight + v * N);
    const int32_t y = labels.one_label(v);
    if (problem_->posterior != nullptr) {
      log_q_.look_up(label, y);
      for (int j = 0; j < c; ++j) field.joint[j * pitch + v] += select(valid != zero, log_q_[j], zero);
      return;
    }
    q_.look_up(label, y);
    V d = zero;
    for (int j = 0; j < c; ++j) d += field.p[j * pitch + v] * q_[j];
    d = select(valid != zero, d, one);
    const V scaled = weight * kind_->gradient_scale, by_d = scaled / d;
    // neither D nor its inverse, which a large weight may take out of the range of the sums
    const V largest = broadcast<V>(R(1) / kSmallestEvidence<R>);
    V nll;
    if (any(~((d >= broadcast<V>(kSmallestEvidence<R>)) & (by_d <= largest) & (by_d >= -largest)))) {
      nll = log_space(field, pitch, label, y, v, scaled, sums);
    } else {
      nll = -log_v(d);
      field.mass[v] += scaled;
      live_ += scaled;
      if (want_own_ || want_sums_) add_shares(field, pitch, labels, y, v, scaled, by_d);
    }
    terms_.add(*kind_, place.at, place.lanes, weight, nll, broadcast<V>(trace_));
    if (want_sums_ && ++run_ == kRun) flush();
  }

  void add_shares(ClassField<R>& field, int pitch, const LabelRun<R>& labels, int32_t y, int v, V live, V by_d) {
    const int c = problem_->classes;
    const V zero = broadcast<V>(R(0));
    V* const own = field.own + v;
    const V* const p = field.p + v;
    V* const share = share_;
    for (int j = 0; j < c; ++j) {
      // where nothing counts p may be NaN
      share[j] = select(live == zero, zero, by_d * p[j * pitch]);
      own[j * pitch] -= share[j] * q_[j];
    }
    if (!want_sums_) return;
    if (y >= 0) {
      V* const sums = sums_ + static_cast<int64_t>(y) * c;
      touched_[y] = true;
      for (int j = 0; j < c; ++j) sums[j] += share[j];
    } else {
      add_by_label(labels.label + v * N, live);
    }
  }

  // Of lanes with several labels.
  void add_by_label(const int32_t* label, V live) {
    const int c = problem_->classes;
    const V zero = broadcast<V>(R(0));
    I of_lane{};
    for (int k = 0; k < N; ++k) of_lane[k] = label[k];
    ++tick_;
    for (int k = 0; k < N; ++k) {
      const int32_t y = label[k];
      if (live[k] == R(0) || seen_[y] == tick_) continue;
      seen_[y] = tick_;
      touched_[y] = true;
      const I own = of_lane == y;
      V* const sums = sums_ + static_cast<int64_t>(y) * c;
      for (int j = 0; j < c; ++j) sums[j] += select(own, share_[j], zero);
    }
  }

  // A vector where some D is small. Returns nll.
  V log_space(ClassField<R>& field, int pitch, const int32_t* label, int32_t y, int v, V scaled, const Sums& to) {
    const int c = problem_->classes;
    const V zero = broadcast<V>(R(0)), one = broadcast<V>(R(1)), inf = broadcast<V>(std::numeric_limits<R>::infinity());
    log_q_.look_up(label, y);
    V* const r = share_;
    V top = -inf, most = field.p[v], sum = zero;
    for (int j = 0; j < c; ++j) {
      most = max_v(field.p[j * pitch + v], most);
      r[j] = field.s[j * pitch + v] + log_q_[j];
      top = max_v(r[j], top);
    }
    const V log_sum = -log_v(most);  // the largest s is 0
    const V shift = select(top == -inf, zero, top);
    for (int j = 0; j < c; ++j) {
      r[j] = exp_v(r[j] - shift);
      sum += r[j];
    }
    const V log_d = shift + log_v(sum) - log_sum;
    const V live = select(sum == zero, zero, scaled), inverse = select(sum == zero, zero, one / sum);
    field.mass[v] += live;
    live_ += live;
    for (int j = 0; j < c; ++j) {
      r[j] = select(live == zero, zero, live * (r[j] * inverse));
      field.own[j * pitch + v] -= r[j];
    }
    if (want_sums_) {
      for (int k = 0; k < N; ++k) {
        if (live[k] == R(0)) continue;
        double* const row = counts_ + static_cast<int64_t>(label[k]) * c;
        for (int j = 0; j < c; ++j) row[j] += static_cast<double>(r[j][k]);
      }
    }
    if (to.transition != nullptr) {
      // p A / D in one exponential: each factor alone may leave the range, and so may the result
      for (int i = 0; i < c; ++i) {
        V share = zero;
        for (int j = 0; j < c; ++j)
          share += scaled_exp(live, (field.s[j * pitch + v] - log_sum) + log_a_[i * c + j] - log_d);
        share = select(live == zero, zero, share);
        for (int k = 0; k < N; ++k) to.transition[i * c + label[k]] -= static_cast<double>(share[k]);
      }
    }
    return select(sum == zero, inf, -log_d);
  }

  // What the vectors hold joins the task's sums.
  void flush() {
    run_ = 0;
    counts_[matrices_->slot - 1] += sum_lanes<R>(live_);
    live_ = V{};
    const int64_t c = problem_->classes;
    double* const by_p = log_a_ == nullptr ? nullptr : counts_ + c * c;
    for (int64_t y = 0; y < c; ++y) {
      if (!touched_[y]) continue;
      touched_[y] = false;
      V* const sums = sums_ + y * c;
      for (int64_t j = 0; j < c; ++j) {
        const double sum = sum_lanes<R>(sums[j]);
        sums[j] = V{};
        counts_[y * c + j] += sum * static_cast<double>(q_.at(j, y));
        if (by_p != nullptr) by_p[j * c + y] += sum;
      }
    }
  }

  void leave() {
    if (counts_ != nullptr) flush();
  }

  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  const MatrixPlan<R>* matrices_ = nullptr;
  bool want_sums_ = false, want_own_ = false;
  int64_t chunks_ = 0, image_ = -1;
  ByLabel<R> q_, log_q_;
  const R* log_a_ = nullptr;
  R trace_ = 0;
  V* share_ = nullptr;       // of a vector: w p[j] / D, or w r[j] in log space
  V* sums_ = nullptr;        // (labels, C), since the last flush
  bool* touched_ = nullptr;  // labels that have sums
  int64_t* seen_ = nullptr;  // of each label, the last vector that it was met in
  int64_t tick_ = 0;
  int run_ = 0;
  V live_{};
  double* counts_ = nullptr;  // S, U where T is learned, L
  Terms<R> terms_;
};

}  // namespace
}  // namespace coarse
