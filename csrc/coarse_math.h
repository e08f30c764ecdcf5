// The mathematics of one pixel, once. The CPU kernels instantiate it with vectors of pixels, everything else (CUDA, the
// native tests) with one float; `V` below is either. Nothing here knows of torch.
//
//   p[j]   = softmax_j(s)                      true class j, from segmentation logits s
//   A[i,j] = softmax_i(a[i,j])                 p(observed i | true j), from CM logits a
//   q[j]   = sum_i T[i,y] A[i,j]               p(label y | true j)
//   D      = sum_j p[j] q[j]                   p(label y);  nll = -log D
//   r[j]   = p[j] q[j] / D                     p(true j | label y), the posterior
//
//   d nll / d s[j]    = p[j] - r[j]
//   d nll / d a[i,j]  = r[j] A[i,j] - p[j] T[i,y] A[i,j] / D
//   d tr  / d a[i,j]  = A[j,j] ([i = j] - A[i,j])
//   d nll / d T[i,y]  = -(sum_j A[i,j] p[j]) / D
//
// The second line is r[j] (A[i,j] - h[i,j]) with h[i,j] = T[i,y] A[i,j] / q[j]: written so that it divides by D alone.
// Everything lies in an anonymous namespace on purpose: the header is compiled once per instruction set, and a function
// shared between translation units would be whichever copy the linker happens to keep.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "grid.h"
#include "host_device.h"

namespace coarse {
namespace {

// --- lanes: what the functions below ask of V ------------------------------------------------------------------------

template <class V>
struct Lanes;  // Scalar: the element; Int, UInt: integers of the same width and shape

template <>
struct Lanes<float> {
  using Scalar = float;
  using Int = int32_t;
  using UInt = uint32_t;
};
template <>
struct Lanes<double> {
  using Scalar = double;
  using Int = int64_t;
  using UInt = uint64_t;
};

// Built-in vector types have no namespace to look functions up in, so these are templates rather than overloads.
template <class M, class V>
COARSE_HD V select(M m, V a, V b) {
  return m ? a : b;
}

template <class V>
COARSE_HD V broadcast(typename Lanes<V>::Scalar x) {
  if constexpr (sizeof(V) == sizeof(x)) {
    return x;
  } else {
    return x - V{};
  }
}

template <class To, class From>
COARSE_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// --- elementary functions --------------------------------------------------------------------------------------------

// 2^n y for an integer n of at least -126, given as t = n + magic. A class, so that an instruction set can do better.
template <class V>
struct PowerOfTwo {
  static COARSE_HD V scale(V y, V t, V magic) {
    using U = typename Lanes<V>::UInt;
    return y * bit_cast<V>((bit_cast<U>(t) - bit_cast<U>(magic) + 127) << 23);
  }
};

// exp(x) for x <= 88. Error at most kExpUlp units in the last place for x >= kExpFlush; exactly 0 below it; NaN stays
// NaN. Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2; then the polynomial of degree 6 with the smallest relative
// error on that interval (2.0e-9: 1/30 of half a unit in the last place).
//
// On a GPU a float goes through the special-function unit: 2^t, t = x / ln 2 rounded. ex2.approx is good to 2^-22.5
// (PTX ISA) and flushes subnormals; the rounding of t costs up to |x| / 2 units more, where exp(x) itself is that much
// smaller than the 1 that it is added to (every x here is a difference to a maximum).
constexpr float kExpFlush = -87.3365f;  // 2^-126: the smallest normal float
constexpr double kExpUlp = 2.0;

// exp_f32 of kCount vectors, a step of all before the next step of any: chains of a dozen multiply-adds one after the
// other fill the scheduler with what waits, all the more where another thread has half of the core.
template <int kCount, class V>
COARSE_HD void exp_f32_each(V* x) {
  const V magic =
      broadcast<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  V t[kCount], r[kCount], y[kCount];
  for (int k = 0; k < kCount; ++k) t[k] = x[k] * broadcast<V>(1.44269504088896341f) + magic;
  for (int k = 0; k < kCount; ++k) y[k] = t[k] - magic;
  for (int k = 0; k < kCount; ++k)
    r[k] = x[k] - y[k] * broadcast<V>(0.693359375f);  // exact: n has at most 8 bits, the constant 9
  for (int k = 0; k < kCount; ++k) r[k] = r[k] + y[k] * broadcast<V>(2.12194440e-4f);
  for (int k = 0; k < kCount; ++k) y[k] = broadcast<V>(1.384364441e-3f) * r[k] + broadcast<V>(8.374163881e-3f);
  constexpr float kTerms[] = {4.166800156e-2f, 1.666643173e-1f, 4.999999404e-1f, 1.0f, 1.0f};
  for (const float term : kTerms)
    for (int k = 0; k < kCount; ++k) y[k] = y[k] * r[k] + broadcast<V>(term);
  for (int k = 0; k < kCount; ++k)
    x[k] = select(x[k] < broadcast<V>(kExpFlush), broadcast<V>(0.0f), PowerOfTwo<V>::scale(y[k], t[k], magic));
}

template <class V>
COARSE_HD V exp_f32(V x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
#elif defined(COARSE_EMULATED)  // with the device's rounding of t
  return x < kExpFlush ? 0.0f : exp2f(x * 1.44269504088896341f);
#else
  exp_f32_each<1>(&x);
  return x;
#endif
}

// 1 / x for x in [1e-30, 1e30]. On a GPU to one unit in the last place, without the branch for subnormals.
template <class V>
COARSE_HD V inverse(V x) {
  using R = typename Lanes<V>::Scalar;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == sizeof(float)) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return R(1) / x;
}

// log(x) for normal x > 0; -inf at 0; +inf and NaN stay. Error at most kLogUlp. Polynomial of Cephes logf (Moshier
// 1992).
constexpr double kLogUlp = 2.0;

template <class V>
COARSE_HD V log_f32(V x) {
  using I = typename Lanes<V>::Int;
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) moves the carry into the exponent.
  const I offset = bit_cast<I>(x) - 0x3f3504f3;
  const I e = offset >> 23;
  const V m = bit_cast<V>((offset & 0x007fffff) + 0x3f3504f3);
  V exponent;
  if constexpr (sizeof(V) == sizeof(float)) {
    exponent = static_cast<V>(e);
  } else {
    exponent = __builtin_convertvector(e, V);
  }
  const V z = m - broadcast<V>(1.0f);
  V y = broadcast<V>(7.0376836292e-2f);
  y = y * z + broadcast<V>(-1.1514610310e-1f);
  y = y * z + broadcast<V>(1.1676998740e-1f);
  y = y * z + broadcast<V>(-1.2420140846e-1f);
  y = y * z + broadcast<V>(1.4249322787e-1f);
  y = y * z + broadcast<V>(-1.6668057665e-1f);
  y = y * z + broadcast<V>(2.0000714765e-1f);
  y = y * z + broadcast<V>(-2.4999993993e-1f);
  y = y * z + broadcast<V>(3.3333331174e-1f);
  const V z2 = z * z;
  y = y * z2 * z + exponent * broadcast<V>(-2.12194440e-4f) - z2 * broadcast<V>(0.5f);
  y = z + y + exponent * broadcast<V>(0.693359375f);
  const V inf = broadcast<V>(std::numeric_limits<float>::infinity());
  y = select(x < inf, y, x);  // +inf, NaN
  return select(x == broadcast<V>(0.0f), -inf, y);
}

// Float: as above. Double exists for checking gradients, not for speed: the C library, lane by lane.
template <class V>
COARSE_HD V exp_v(V x) {
  if constexpr (sizeof(typename Lanes<V>::Scalar) == sizeof(float)) {
    return exp_f32(x);
  } else if constexpr (sizeof(V) == sizeof(double)) {
    return exp(x);
  } else {
    for (unsigned k = 0; k < sizeof(V) / sizeof(double); ++k) x[k] = exp(x[k]);
    return x;
  }
}

// exp_v of kCount vectors, interleaved.
template <int kCount, class V>
COARSE_HD void exp_each(V* x) {
  if constexpr (sizeof(typename Lanes<V>::Scalar) == sizeof(float) && sizeof(V) > sizeof(float)) {
    exp_f32_each<kCount>(x);
  } else {
    for (int k = 0; k < kCount; ++k) x[k] = exp_v(x[k]);
  }
}

template <class V>
COARSE_HD V log_v(V x) {
  if constexpr (sizeof(typename Lanes<V>::Scalar) == sizeof(float)) {
    return log_f32(x);
  } else if constexpr (sizeof(V) == sizeof(double)) {
    return log(x);
  } else {
    for (unsigned k = 0; k < sizeof(V) / sizeof(double); ++k) x[k] = log(x[k]);
    return x;
  }
}

// exp that overflows to +inf (from x = 88 on in float) instead of leaving its range.
template <class V>
COARSE_HD V exp_wide(V x) {
  using R = typename Lanes<V>::Scalar;
  const V limit = broadcast<V>(R(sizeof(R) == 4 ? 88.0 : 709.0));
  return select(x > limit, broadcast<V>(std::numeric_limits<R>::infinity()), exp_v(select(x > limit, limit, x)));
}

// factor * exp(x), where the exponential alone may leave the range: what is beyond e^60 is multiplied last.
template <class V>
COARSE_HD V scaled_exp(V factor, V x) {
  using R = typename Lanes<V>::Scalar;
  const V zero = broadcast<V>(R(0)), most = broadcast<V>(R(sizeof(R) == 4 ? 88.0 : 709.0));
  const V over = x - broadcast<V>(R(sizeof(R) == 4 ? 60.0 : 600.0));
  const V beyond = select(over > zero, select(over > most, most, over), zero);
  return factor * exp_wide(x - beyond) * exp_v(beyond);
}

template <class V>
COARSE_HD V max_v(V a, V b) {
  return select(a > b, a, b);
}
template <class V>
COARSE_HD V min_v(V a, V b) {
  return select(a < b, a, b);
}

// --- one pixel, probability space ------------------------------------------------------------------------------------
//
// With e[i,j] = exp(a[i,j] - max_i a[i,j]) and Z[j] = sum_i e[i,j], so A = e / Z, the gradient of
// weight * (nll + trace_weight * tr A) with respect to the CM logits is
//
//   e[i,j] (keep[j] - T[i,y] drop[j]) + [i = j] diag[j]
//
// which leaves one multiply-add and one multiply for each of the C x C entries.
template <class V>
struct ColumnGradient {
  V keep, drop, diag;
};

// inv_z = 1 / Z[j]; r, p, inv_d as above; ajj = A[j,j]; weight and trace already hold the pixel's weight.
template <class V>
COARSE_HD ColumnGradient<V> column_gradient(V p, V r, V inv_d, V inv_z, V ajj, V weight, V trace) {
  const V diag = trace * ajj;
  return {(weight * r - diag) * inv_z, weight * p * inv_d * inv_z, diag};
}

// Smallest D for which probability space is exact enough: terms of D that underflowed (below 2^-126) are then less than
// 1e-8 of it. Below, `pixel_log_space`. For double the same reasoning with its own range.
template <class R>
constexpr R kSmallestEvidence = sizeof(R) == 4 ? R(1e-30) : R(1e-290);

// --- one pixel, log space --------------------------------------------------------------------------------------------
//
// Every exponential is of a difference of two logits divided by a sum that contains it, never of a difference of
// logarithms: at a logit scale of 100 the latter costs two digits.

// T[i,y] and its logarithm. T is a factor, not part of an exponent, where it matters: beside a logit of 1e4 the sum
// a + log T keeps three digits of log T. The logarithm finds the largest term.
template <class V>
struct Reported {
  V t, log_t;
};

// What a column j of A contributes, from load(i) = a[i,j] and reported(i) = T[i,y].
template <class V>
struct ColumnTerms {
  V top;        // max_i a[i,j]
  V inv_z;      // 1 / sum_i exp(a[i,j] - top)
  V label_top;  // a[i,j] of the largest T[i,y] exp(a[i,j]), less kTinyReport where that T is tiny; 0 where T allows
                // none
  V inv_q;      // 1 / sum_i T[i,y] exp(a[i,j] - label_top), 0 likewise
  V log_q;      // log q[j]
};

// Below e^-kTinyReport an entry of T counts as tiny: beside it, terms that matter would underflow, and so might the
// entry.
template <class R>
constexpr R kTinyReport = sizeof(R) == 4 ? R(69) : R(667);  // as kSmallestEvidence

// T[i,y] exp(x - label_top). The exponential alone may overflow where T is tiny, the product cannot.
template <class V>
COARSE_HD V reported_term(const Reported<V>& reported, V x, V label_top) {
  using R = typename Lanes<V>::Scalar;
  const V difference = x - label_top, far = broadcast<V>(R(60));
  return select(difference > far, exp_v(difference + reported.log_t),
                reported.t * exp_v(select(difference > far, far, difference)));
}

template <class V, class Load, class Report>
COARSE_HD ColumnTerms<V> column_terms(int classes, const Load& load, const Report& report) {
  using R = typename Lanes<V>::Scalar;
  const V zero = broadcast<V>(R(0));
  const V inf = broadcast<V>(std::numeric_limits<R>::infinity());
  V top = load(0), largest = -inf, label_top = zero;
  for (int i = 0; i < classes; ++i) {
    const V x = load(i), term = x + report(i).log_t;
    top = max_v(x, top);
    label_top = select(term > largest, x, label_top);
    largest = max_v(term, largest);
  }
  // sums are then of the order of 1
  label_top -= select(largest - label_top < broadcast<V>(-kTinyReport<R>), broadcast<V>(kTinyReport<R>), zero);
  V z = zero, q = zero;
  for (int i = 0; i < classes; ++i) {
    const V x = load(i);
    z += exp_v(x - top);
    q += reported_term(report(i), x, label_top);
  }
  return {top, R(1) / z, label_top, select(q == zero, zero, R(1) / q), (label_top - top) + (log_v(q) - log_v(z))};
}

// d (live * nll + live_trace * tr A) / d a[i,j], from x = a[i,j] and ajj = A[j,j]. `posterior` is r[j].
template <class V>
COARSE_HD V column_gradient_log_space(const ColumnTerms<V>& column, V x, const Reported<V>& reported, V posterior,
                                      V ajj, bool diagonal, V live, V live_trace) {
  using R = typename Lanes<V>::Scalar;
  const V zero = broadcast<V>(R(0));
  const V aij = exp_v(x - column.top) * column.inv_z;
  const V hij = reported_term(reported, x, column.label_top) * column.inv_q;
  V gradient = live * (posterior * (aij - hij)) - live_trace * ajj * aij;
  if (diagonal) gradient += live_trace * ajj;
  // 0 where neither counts, or 0 * NaN would be NaN. Each for itself: a trace weight of -1 makes their sum 0.
  return select((live == zero) & (live_trace == zero), zero, gradient);
}

template <class V>
struct PixelTerms {
  V nll, trace;
};

// Any logits (finite, or -inf in some entries). Reads s[C], a[C*C] (index i*C+j) and t[i] = T[i,y].
// Writes p[C] and the posterior r[C]; over a[i,j] the gradient of weight * nll + trace_weight * tr A; and, where
// `reported` is not null, reported[i] = -weight * (sum_j A[i,j] p[j]) / D, the gradient of T[i,y]. `columns` holds C.
// A label that no class can explain (D = 0): nll = inf, r = p, and its gradients are 0.
template <class V>
COARSE_HD PixelTerms<V> pixel_log_space(int classes, const V* s, V* a, const Reported<V>* t, V weight, V trace_weight,
                                        V* p, V* r, ColumnTerms<V>* columns, V* reported) {
  using R = typename Lanes<V>::Scalar;
  const V zero = broadcast<V>(R(0));
  const V inf = broadcast<V>(std::numeric_limits<R>::infinity());
  const auto label = [&](int i) { return t[i]; };

  V top = s[0];
  for (int j = 1; j < classes; ++j) top = max_v(s[j], top);
  V sum = zero;
  for (int j = 0; j < classes; ++j) {
    p[j] = exp_v(s[j] - top);
    sum += p[j];
  }
  for (int j = 0; j < classes; ++j) p[j] = p[j] / sum;

  // r[j] = log(p[j] q[j]) up to a constant of the pixel, joint_top its maximum
  V trace = zero, joint_top = -inf;
  const V log_sum = log_v(sum);
  for (int j = 0; j < classes; ++j) {
    columns[j] = column_terms<V>(classes, [&](int i) { return a[i * classes + j]; }, label);
    trace += exp_v(a[j * classes + j] - columns[j].top) * columns[j].inv_z;
    r[j] = (s[j] - top) + columns[j].log_q;
    joint_top = max_v(r[j], joint_top);
  }
  // -inf - -inf must not become NaN where the label is impossible; a NaN among the logits must stay one.
  const V shift = select(joint_top == -inf, zero, joint_top);
  sum = zero;
  for (int j = 0; j < classes; ++j) {
    r[j] = exp_v(r[j] - shift);
    sum += r[j];
  }
  const V log_d = shift + log_v(sum) - log_sum;
  const V possible = select(sum == zero, zero, broadcast<V>(R(1)));
  const V live = weight * possible, live_trace = trace_weight * possible;

  if (reported != nullptr) {
    for (int i = 0; i < classes; ++i) reported[i] = zero;
  }
  for (int j = 0; j < classes; ++j) {
    const ColumnTerms<V>& column = columns[j];
    const V posterior = select(sum == zero, p[j], r[j] / sum);
    const V ajj = exp_v(a[j * classes + j] - column.top) * column.inv_z;
    for (int i = 0; i < classes; ++i) {
      const V x = a[i * classes + j];
      if (reported != nullptr) {
        // p A / D in one exponential: each factor alone may leave the range, and so may the result
        reported[i] -= select(live == zero, zero,
                              scaled_exp(live, (s[j] - top - log_sum) + (x - column.top) - log_d) * column.inv_z);
      }
      a[i * classes + j] = column_gradient_log_space(column, x, t[i], posterior, ajj, i == j, live, live_trace);
    }
    r[j] = posterior;
  }
  return {select(sum == zero, inf, -log_d), trace};
}

}  // namespace
}  // namespace coarse
