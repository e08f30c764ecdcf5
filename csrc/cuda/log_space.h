// One pixel per lane, in log space: right for any logits and any number of classes. The general kernel is made of it,
// and the fast ones turn to it for pixels whose probabilities are too small (coarse_math.h, kSmallestEvidence).
//
// The warps of a block share the pixel's columns. A column's logits are read several times, from cache after the first,
// which costs about five times the exponentials of the fast way and no memory that grows with C x C.
#pragma once

#include "device.h"

namespace coarse {
namespace {

// The columns that a thread works on: first, first + step, ... of every pixel of its warp. `joint` is shared memory of
// the warps that work on the same pixels: one value for each column and lane, `pitch` apart.
template <class R>
struct ColumnShare {
  int first, step;
  R* joint;
  int pitch;
};

template <class R>
struct LogSpaceResult {
  R nll, trace;           // trace on the warp with first = 0 only
  R top, log_sum, log_d;  // of the class logits; of the evidence
  bool possible;          // some class explains the label
};

// Called by all threads of the block alike. seg(j) and logit(i, j) give the pixel's logits, and 0 on lanes that have no
// labelled pixel (label < 0): those compute along, so that shuffles in `emit` meet every lane. emit(i, j, g) gets the
// gradient of a[i,j], seg_out(j, p, r) the two distributions. scaled, scaled_trace: weights of nll and trace in the
// loss.
template <class R, class Seg, class Logit, class Emit, class SegOut>
__device__ LogSpaceResult<R> log_space(const Layer<R>& s, const ColumnShare<R>& share, int label, R scaled,
                                       R scaled_trace, bool want_gradient, const Seg& seg, const Logit& logit,
                                       const Emit& emit, const SegOut& seg_out) {
  const R inf = std::numeric_limits<R>::infinity();
  const int classes = s.classes;
  const auto report = [&](int i) {
    if (s.transition == nullptr) return i == label ? Reported<R>{R(1), R(0)} : Reported<R>{R(0), -inf};
    if (label < 0) return Reported<R>{R(1), R(0)};
    return Reported<R>{s.transition[i * classes + label], s.log_transition[i * classes + label]};
  };
  R top = seg(0);
  for (int j = 1; j < classes; ++j) top = max_v(seg(j), top);
  R sum = 0;
  for (int j = 0; j < classes; ++j) sum += exp_v(seg(j) - top);

  for (int j = share.first; j < classes; j += share.step) {
    const auto column = column_terms<R>(classes, [&](int i) { return logit(i, j); }, report);
    share.joint[j * share.pitch] = (seg(j) - top) + column.log_q;
  }
  __syncthreads();
  R joint_top = -inf;
  for (int j = 0; j < classes; ++j) joint_top = max_v(share.joint[j * share.pitch], joint_top);
  const R shift = joint_top == -inf ? R(0) : joint_top;
  R total = 0;
  for (int j = 0; j < classes; ++j) total += exp_v(share.joint[j * share.pitch] - shift);
  __syncthreads();

  LogSpaceResult<R> result;
  result.possible = !(total == R(0));  // NaN counts as possible, so that it is seen
  result.top = top;
  result.log_sum = log_v(sum);
  result.log_d = shift + log_v(total) - result.log_sum;
  result.nll = result.possible ? -result.log_d : inf;
  const R live = result.possible ? scaled : R(0), live_trace = result.possible ? scaled_trace : R(0);
  for (int j = share.first; j < classes; j += share.step) {
    R* const own = share.joint + j * share.pitch;
    const auto column = column_terms<R>(classes, [&](int i) { return logit(i, j); }, report);
    const R p = exp_v(seg(j) - top) / sum;
    const R r = result.possible ? exp_v(*own - shift) / total : p;
    const R ajj = exp_v(logit(j, j) - column.top) * column.inv_z;
    if (want_gradient) {
      for (int i = 0; i < classes; ++i) {
        emit(i, j, column_gradient_log_space(column, logit(i, j), report(i), r, ajj, i == j, live, live_trace));
      }
    }
    seg_out(j, p, r);
    *own = ajj;
  }
  __syncthreads();
  result.trace = 0;
  if (share.first == 0) {
    for (int j = 0; j < classes; ++j) result.trace += share.joint[j * share.pitch];
  }
  __syncthreads();
  return result;
}

}  // namespace
}  // namespace coarse
