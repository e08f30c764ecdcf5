// A kind of drawings with one matrix for all pixels of an image: what is done once an image, in double and on any
// machine. Before the pixels (one_matrix.h) the tables that they look up,
//
//   A[i,j] = softmax_i(a[i,j]),   q[j,y] = sum_i T[i,y] A[i,j],   and their logarithms;
//
// after them the gradients, of which the pixels leave sums over all with label y:
//
//   S[y,j] = sum of w r[j]      U[j,y] = sum of w p[j] / D      L = sum of w       (r = p q / D)
//
//   d loss / d a[i,j] = A[i,j] sum_y S[y,j] - sum_y S[y,j] T[i,y] A[i,j] / q[j,y]
//                       + trace_weight L A[j,j] ([i = j] - A[i,j])
//   d loss / d T[i,y] = - sum_j A[i,j] U[j,y]
//
// U is not S / q: q may be 0 where T is, and the gradient of T is not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../coarse_math.h"
#include "../half.h"
#include "kernel_set.h"

namespace coarse {
namespace {

template <class R>
class Matrices {
 public:
  // Of the kind `index`, which has the form `one_matrix`. `learned`: the gradient of T is wanted.
  Matrices(const Problem<R>& problem, const Plan<R>& plan, int index, bool learned)
      : kind_(problem.kinds[index]),
        classes_(problem.classes),
        images_(kind_.field.images),
        chunks_(plan.chunk_count),
        groups_(images_ == 1 ? plan.groups : 1),
        learned_(learned) {
    const auto n = static_cast<size_t>(images_ * entries());
    for (std::vector<double>* table : {&a_, &q_}) table->resize(n);
    for (std::vector<R>* table : {&own_q_, &log_q_}) table->resize(n);
    trace_.resize(static_cast<size_t>(images_));
    labelled_.resize(static_cast<size_t>(images_));
    if (learned_) log_a_.resize(n);
    counts_.resize(counted() ? static_cast<size_t>(images_ * groups_ * chunks_ * slot()) : 0);
    if (kind_.field.gradient != nullptr) gradient_.resize(n);
    if (kind_.transition == nullptr) return;
    log_t_.resize(static_cast<size_t>(entries()));
    for (int64_t k = 0; k < entries(); ++k)
      log_t_[static_cast<size_t>(k)] = std::log(static_cast<double>(kind_.transition[k]));
  }
  Matrices(const Matrices&) = delete;

  // --- before the pixels: `form` for every column of every image, then `find_traces` ---------------------------------

  int64_t columns() const { return images_ * classes_; }

  void form(int64_t column) {
    const int64_t image = column / classes_, j = column % classes_, c = classes_;
    const auto load = [&](int64_t i) { return logit(image, i, j); };
    double* const a = a_.data() + image * entries();
    double* const q = q_.data() + image * entries() + j * c;
    double top = load(0), z = 0;
    for (int64_t i = 1; i < c; ++i) top = max_v(load(i), top);
    for (int64_t i = 0; i < c; ++i) z += a[i * c + j] = std::exp(load(i) - top);
    const double log_z = std::log(z);
    for (int64_t i = 0; i < c; ++i) a[i * c + j] /= z;
    for (int64_t i = 0; i < c && learned_; ++i)
      log_a_[static_cast<size_t>(image * entries() + i * c + j)] = static_cast<R>(load(i) - top - log_z);
    const auto put = [&](int64_t y, double log_q) {
      const auto at = static_cast<size_t>(image * entries() + j * c + y);
      own_q_[at] = static_cast<R>(q[y]);
      log_q_[at] = static_cast<R>(log_q);
    };
    if (kind_.transition == nullptr) {
      for (int64_t y = 0; y < c; ++y) {
        q[y] = a[y * c + j];
        put(y, load(y) - top - log_z);
      }
      return;
    }
    for (int64_t y = 0; y < c; ++y) q[y] = 0;
    for (int64_t i = 0; i < c; ++i) {
      const R* const t = kind_.transition + i * c;
      for (int64_t y = 0; y < c; ++y) q[y] += static_cast<double>(t[y]) * a[i * c + j];
    }
    for (int64_t y = 0; y < c; ++y) put(y, exact(q[y]) ? std::log(q[y]) : terms(image, j, y).log_q);
  }

  void find_traces() {
    for (int64_t image = 0; image < images_; ++image) {
      double sum = 0;
      for (int64_t j = 0; j < classes_; ++j) sum += entry(image, j, j);
      trace_[static_cast<size_t>(image)] = static_cast<R>(sum);
    }
  }

  MatrixPlan<R> plan() {
    return {own_q_.data(),
            log_q_.data(),
            learned_ ? log_a_.data() : nullptr,
            trace_.data(),
            counted() ? counts_.data() : nullptr,
            slot()};
  }

  // --- after them: `gather` for every image, then `settle` for every row of every one, `settle_transition` for every
  // row of T ----------------------------------------------------------------------------------------------------------

  bool counted() const { return kind_.field.gradient != nullptr || learned_; }
  int64_t images() const { return images_; }

  // The sums of an image: those of all chunks, of all groups where images share the matrix.
  void gather(int64_t image) {
    double* const sum = counts(image);
    for (int64_t part = 1; part < groups_ * chunks_; ++part) {
      const double* const from = sum + part * slot();
      for (int64_t k = 0; k < slot(); ++k) sum[k] += from[k];
    }
    // Not L alone: weights of a backward pass have either sign, and may add up to nothing.
    labelled_[static_cast<size_t>(image)] = std::any_of(sum, sum + slot(), [](double x) { return x != 0; });
    if (kind_.field.gradient == nullptr || kind_.transition == nullptr || !labelled(image)) return;
    // S becomes S / q, but where that is more than doubles hold
    double* const gradient = gradient_.data() + image * entries();
    for (int64_t j = 0; j < classes_; ++j) {
      double total = 0;
      for (int64_t y = 0; y < classes_; ++y) {
        double& own = sum[y * classes_ + j];
        const double q = q_[static_cast<size_t>(image * entries() + j * classes_ + y)];
        total += own;
        if (own == 0) continue;
        if (exact(q)) {
          own /= q;
          continue;
        }
        const ColumnTerms<double> column = terms(image, j, y);
        for (int64_t i = 0; i < classes_; ++i) {
          const double share = reported_term(reported(i, y), logit(image, i, j), column.label_top) * column.inv_q;
          gradient[i * classes_ + j] -= own * share;
        }
        own = 0;
      }
      for (int64_t i = 0; i < classes_; ++i) gradient[i * classes_ + j] += entry(image, i, j) * total;
    }
  }

  // Row i of the gradient of an image's matrix.
  void settle(int64_t row) {
    const int64_t image = row / classes_, i = row % classes_, c = classes_;
    if (!labelled(image)) return;  // the matrix may be anything
    const double* const sum = counts(image);
    double* const gradient = gradient_.data() + row * c;
    if (kind_.transition == nullptr) {
      std::vector<double> total(static_cast<size_t>(c));
      for (int64_t y = 0; y < c; ++y)
        for (int64_t j = 0; j < c; ++j) total[static_cast<size_t>(j)] += sum[y * c + j];
      for (int64_t j = 0; j < c; ++j) gradient[j] = entry(image, i, j) * total[static_cast<size_t>(j)] - sum[i * c + j];
    } else {
      std::vector<double> share(static_cast<size_t>(c));
      for (int64_t y = 0; y < c; ++y) {
        const auto t = static_cast<double>(kind_.transition[i * c + y]);
        for (int64_t j = 0; j < c; ++j) share[static_cast<size_t>(j)] += t * sum[y * c + j];
      }
      for (int64_t j = 0; j < c; ++j) gradient[j] -= entry(image, i, j) * share[static_cast<size_t>(j)];
    }
    const double trace = static_cast<double>(kind_.trace_weight) * live(image);
    if (trace == 0) return;
    for (int64_t j = 0; j < c; ++j)
      gradient[j] += trace * entry(image, j, j) * ((i == j ? 1.0 : 0.0) - entry(image, i, j));
  }

  // Adds row i of the gradient of T to `to`.
  void settle_transition(int64_t i, double* to) const {
    const int64_t c = classes_;
    for (int64_t image = 0; image < images_; ++image) {
      if (!labelled(image)) continue;
      const double* const sum = counts(image) + entries();
      for (int64_t j = 0; j < c; ++j)
        for (int64_t y = 0; y < c; ++y) to[i * c + y] -= entry(image, i, j) * sum[j * c + y];
    }
  }

  const std::vector<double>& gradient() const { return gradient_; }  // (images, C, C)

 private:
  // Of what doubles hold, far enough from the smallest for terms that underflowed to matter.
  static bool exact(double q) { return q >= kSmallestEvidence<double>; }

  int64_t entries() const { return static_cast<int64_t>(classes_) * classes_; }
  int64_t slot() const { return entries() * (learned_ ? 2 : 1) + 1; }
  double entry(int64_t image, int64_t i, int64_t j) const {
    return a_[static_cast<size_t>(image * entries() + i * classes_ + j)];
  }
  double* counts(int64_t image) { return counts_.data() + image * groups_ * chunks_ * slot(); }
  const double* counts(int64_t image) const { return counts_.data() + image * groups_ * chunks_ * slot(); }
  double live(int64_t image) const { return counts(image)[slot() - 1]; }
  bool labelled(int64_t image) const { return labelled_[static_cast<size_t>(image)] != 0; }

  double logit(int64_t image, int64_t i, int64_t j) const {
    const int64_t at = image * kind_.field.image_stride + i * classes_ + j;
    switch (kind_.field.storage) {
      case Storage::f32: return static_cast<double>(static_cast<const float*>(kind_.field.data)[at]);
      case Storage::f64: return static_cast<const double*>(kind_.field.data)[at];
      case Storage::bf16:
        return static_cast<double>(bfloat16_to_float(static_cast<const uint16_t*>(kind_.field.data)[at]));
      default: return static_cast<double>(half_to_float(static_cast<const uint16_t*>(kind_.field.data)[at]));
    }
  }
  Reported<double> reported(int64_t i, int64_t y) const {
    const int64_t at = i * classes_ + y;
    return {static_cast<double>(kind_.transition[at]), log_t_[static_cast<size_t>(at)]};
  }
  // q[j,y] in log space.
  ColumnTerms<double> terms(int64_t image, int64_t j, int64_t y) const {
    return column_terms<double>(
        classes_, [&](int i) { return logit(image, i, j); }, [&](int i) { return reported(i, y); });
  }

  const Drawings<R>& kind_;
  int classes_;
  int64_t images_, chunks_, groups_;  // groups: of images that share the matrix, each with sums of its own
  bool learned_;
  std::vector<double> a_, q_;             // (images, C, C): A[i,j] and q[j,y]
  std::vector<double> log_t_;             // (C, C)
  std::vector<R> own_q_, log_q_, log_a_;  // (images, C, C), for the pixels
  std::vector<R> trace_;                  // (images)
  std::vector<double> counts_;            // (images, groups, chunks, slot): S, U where T is learned, L
  std::vector<double> gradient_;
  std::vector<char> labelled_;  // (images): whether a pixel left anything, a NaN too
};

}  // namespace
}  // namespace coarse
