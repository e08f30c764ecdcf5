// Drawings that are trusted, A = I: q[j] = T[j, y]. C exponentials a pixel, which the class field has paid already.
//
//   T = I   nll = log_sum - s[y],                r = one-hot at y
//   else    D = sum_j p[j] T[j,y], nll = -log D,  r[j] = p[j] T[j,y] / D;   in log space where D is small
//   d nll / dT[i,y] = -p[i] / D
#pragma once

#include "by_label.h"
#include "class_field.h"

namespace coarse {
namespace {

template <class R>
class Trusted {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  void init(const Problem<R>& problem, const Drawings<R>& kind, Arena& arena) {
    problem_ = &problem;
    kind_ = &kind;
    if (kind.transition == nullptr) return;
    reported_.init(problem.classes, arena);
    r_ = arena.take<V>(problem.classes);
  }

  // With the workspace in place.
  void begin() {
    if (kind_->transition != nullptr) reported_.set(kind_->transition);
  }

  void run(ClassField<R>& field, const Slab& slab, const LabelRun<R>* layers, const Sums& sums) {
    for_each_labelled(*problem_, *kind_, slab, layers, [&](const LabelRun<R>& labels, const Place& place) {
      kind_->transition == nullptr ? one_hot(field, slab, labels, place) : mixed(field, slab, labels, place, sums);
    });
    terms_.leave(sums);
  }

 private:
  void one_hot(ClassField<R>& field, const Slab& slab, const LabelRun<R>& labels, const Place& place) {
    const int c = problem_->classes, pitch = slab.pitch, v = place.v;
    const V zero = broadcast<V>(R(0)), inf = broadcast<V>(std::numeric_limits<R>::infinity());
    const int32_t* const label = labels.label + v * N;
    const V valid = load(labels.valid + v * N), weight = load(labels.weight + v * N);
    const int32_t y = labels.one_label(v);
    if (problem_->posterior != nullptr) {
      for (int j = 0; j < c; ++j) {
        V other = zero;
        for (int k = 0; k < N; ++k) other[k] = label[k] == j ? R(0) : -std::numeric_limits<R>::infinity();
        field.joint[j * pitch + v] += select(valid != zero, other, zero);
      }
      return;
    }
    V at_label = zero;
    if (y >= 0) {
      at_label = field.s[y * pitch + v];
    } else {
      for (int k = 0; k < N; ++k) at_label[k] = field.s[label[k] * pitch + v][k];
    }
    const V nll = field.log_sum[v] - at_label;
    const V scaled = weight * kind_->gradient_scale, live = select(nll == inf, zero, scaled);
    field.mass[v] += live;
    if (y >= 0) {
      field.own[y * pitch + v] -= live;
    } else {
      for (int k = 0; k < N; ++k) reinterpret_cast<R*>(field.own + label[k] * pitch + v)[k] -= live[k];
    }
    terms_.add(*kind_, place.at, place.lanes, weight, nll, zero);
  }

  void mixed(ClassField<R>& field, const Slab& slab, const LabelRun<R>& labels, const Place& place, const Sums& sums) {
    const int c = problem_->classes, pitch = slab.pitch, v = place.v;
    const V zero = broadcast<V>(R(0)), one = broadcast<V>(R(1)), inf = broadcast<V>(std::numeric_limits<R>::infinity());
    const int32_t* const label = labels.label + v * N;
    const V valid = load(labels.valid + v * N), weight = load(labels.weight + v * N);
    reported_.look_up(label, labels.one_label(v));
    if (problem_->posterior != nullptr) {
      for (int j = 0; j < c; ++j) field.joint[j * pitch + v] += select(valid != zero, log_of(reported_[j]), zero);
      return;
    }
    V d = zero;
    for (int j = 0; j < c; ++j) d += field.p[j * pitch + v] * reported_[j];
    d = select(valid != zero, d, one);
    const V scaled = weight * kind_->gradient_scale;
    V nll, live = scaled, log_d = zero;
    const bool small = any(!(d >= broadcast<V>(kSmallestEvidence<R>)));
    if (small) {
      // s[j] is at most 0; of the classes that T allows, relative to the largest
      V top = -inf, sum = zero;
      for (int j = 0; j < c; ++j) top = max_v(select(reported_[j] > zero, field.s[j * pitch + v], -inf), top);
      V shift = select(top == -inf, zero, top);
      const bool tiny = shift_tiny(field, slab, v, &shift);
      for (int j = 0; j < c; ++j) {
        const V x = field.s[j * pitch + v];
        const V term =
            tiny ? reported_term<V>({reported_[j], log_of(reported_[j])}, x, shift) : reported_[j] * exp_v(x - shift);
        r_[j] = select(reported_[j] > zero, term, zero);
        // a NaN is to be seen, wherever it is
        r_[j] = select(field.s[j * pitch + v] == field.s[j * pitch + v], r_[j], field.s[j * pitch + v]);
        sum += r_[j];
      }
      log_d = shift + log_v(sum) - field.log_sum[v];
      nll = select(sum == zero, inf, -log_d);
      live = select(sum == zero, zero, scaled);
      const V inv = select(sum == zero, zero, one / sum);
      for (int j = 0; j < c; ++j) r_[j] *= inv;
    } else {
      nll = -log_v(d);
      const V inv_d = one / d;
      for (int j = 0; j < c; ++j) r_[j] = field.p[j * pitch + v] * reported_[j] * inv_d;
    }
    field.mass[v] += live;
    for (int j = 0; j < c; ++j) field.own[j * pitch + v] -= select(live == zero, zero, live * r_[j]);
    if (double* const sum = sums.transition; sum != nullptr) {
      for (int i = 0; i < c; ++i) {
        const V share = small ? scaled_exp(live, field.s[i * pitch + v] - field.log_sum[v] - log_d)
                              : live * (field.p[i * pitch + v] / d);
        const V each = select(live == zero, zero, share);
        for (int k = 0; k < N; ++k) sum[i * c + label[k]] -= static_cast<double>(each[k]);
      }
    }
    terms_.add(*kind_, place.at, place.lanes, weight, nll, zero);
  }

  // Where T has tiny entries: what its largest term is to be relative to, as in `column_terms`. False: there are none.
  bool shift_tiny(const ClassField<R>& field, const Slab& slab, int v, V* shift) const {
    const V zero = broadcast<V>(R(0)), smallest = broadcast<V>(kSmallestEvidence<R>);
    I tiny = zero != zero;
    for (int j = 0; j < problem_->classes; ++j) tiny |= (reported_[j] > zero) & (reported_[j] < smallest);
    if (!any(tiny)) return false;
    V largest = broadcast<V>(-std::numeric_limits<R>::infinity()), at = zero;
    for (int j = 0; j < problem_->classes; ++j) {
      const V x = field.s[j * slab.pitch + v], term = x + log_of(reported_[j]);
      at = select(term > largest, x, at);
      largest = max_v(term, largest);
    }
    at -= select(largest - at < broadcast<V>(-kTinyReport<R>), broadcast<V>(kTinyReport<R>), zero);
    *shift = select(tiny, at, *shift);
    return true;
  }

  // Of the C library: T may hold subnormals.
  static V log_of(V x) {
    for (int k = 0; k < N; ++k) x[k] = std::log(x[k]);
    return x;
  }

  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  ByLabel<R> reported_;  // T[j, y]
  V* r_ = nullptr;
  Terms<R> terms_;
};

}  // namespace
}  // namespace coarse
