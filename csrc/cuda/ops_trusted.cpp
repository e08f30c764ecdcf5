// The operators on trusted drawings, and on none: cross-entropy from logits on their own grid (`trusted`), the most
// probable class (`label_map`). As in ops_cuda.cpp: nothing waits for the device, nothing allocates but PyTorch.
#include <tuple>
#include <utility>

#include "../describe.h"
#include "glue.h"
#include "trusted.h"

namespace {

using coarse::Trusted;
using Tensors = std::vector<Tensor>;
using TrustedOutput = std::tuple<Tensor, Tensors, Tensor, Tensors>;

template <class R>
Trusted<R> on_device(const Problem<R>& problem) {
  STD_TORCH_CHECK(problem.pixels() < (int64_t{1} << 31), "labels: expected fewer than 2^31 pixels in an image");
  Trusted<R> t;
  t.batch = problem.batch;
  const int64_t size[3] = {problem.depth, problem.height, problem.width};
  for (int axis = 0; axis < 3; ++axis) {
    t.size[axis] = static_cast<int>(size[axis]);
    t.grid[axis] = static_cast<int>(problem.seg.grid[axis]);
  }
  t.classes = problem.classes;
  t.storage = problem.seg.storage;
  t.seg_logits = problem.seg.data;
  t.ignore_index = problem.ignore_index;
  t.kind_count = problem.kind_count;
  for (int k = 0; k < problem.kind_count; ++k) {
    const Drawings<R>& from = problem.kinds[k];
    coarse::TrustedKind<R>& kind = t.kinds[k];
    kind.labels = from.labels;
    kind.label_type = from.label_type;
    kind.layers = from.layers;
    kind.transition = from.transition;
    kind.class_weight = from.class_weight;
    kind.pixel_weight = from.pixel_weight;
    t.layers += kind.layers;
  }
  return t;
}

template <class R>
TrustedOutput trusted_nll(Inputs in, const std::vector<double>& weight, int64_t ignore_index, bool per_pixel,
                          int64_t wanted) {
  const size_t count = in.kinds();
  STD_TORCH_CHECK(weight.size() == count && in.class_weight.size() == count && in.pixel_weight.size() == count &&
                      in.scale.size() == count,
                  "one element for each kind of drawings");
  std::vector<Drawings<R>> drawings;
  const Problem<R> problem = describe<R>(in, ignore_index, drawings);
  Trusted<R> t = on_device(problem);
  const OnDevice device(in.seg_logits);
  const Tensor& like = in.seg_logits;
  void* const stream = device.stream;
  const auto empty = [&](std::vector<int64_t> size) { return new_tensor(like, std::move(size), dtype_of<R>()); };
  const auto zeros = [&](int64_t n) {
    Tensor sums = new_tensor(like, {n}, ScalarType::Double);
    check(cuda::fill_zero(sums.data_ptr(), 8 * n, stream));
    return sums;
  };

  Tensor loss = per_pixel ? empty({0}) : empty({});
  Tensors nll, transition_gradients;
  cuda::TrustedSums<R> sums{};
  sums.loss = static_cast<R*>(loss.data_ptr());
  bool learned = false, any_transition = false;
  for (size_t k = 0; k < count; ++k) {
    coarse::TrustedKind<R>& kind = t.kinds[k];
    nll.push_back(empty(per_pixel ? sizes_of(in.labels[k]) : std::vector<int64_t>{}));
    (per_pixel ? kind.nll_map : sums.nll[k]) = static_cast<R*>(nll[k].data_ptr());
    kind.scale = constant<R>(in.scale[k], 1, "scale");
    kind.weight = weight[k];
    STD_TORCH_CHECK(!per_pixel || (kind.scale == nullptr && weight[k] == 1.0),
                    "scale, weight: a map of pixels has none");
    const bool want = kind.transition != nullptr && (wanted & transition_bit(static_cast<int64_t>(k))) != 0;
    learned = learned || want;
    any_transition = any_transition || kind.transition != nullptr;
    transition_gradients.push_back(want ? empty({t.classes, t.classes}) : empty({0}));
  }
  const bool want_seg = (wanted & kSeg) != 0, gathers = want_seg && !t.on_pixels();
  Tensor seg_gradient = want_seg ? new_tensor(like, sizes_of(like), like.scalar_type()) : empty({0});
  if (want_seg) t.gradient = seg_gradient.data_ptr();
  const Tensor rows = zeros(static_cast<int64_t>(count) * cuda::kSumRows);
  t.sums = static_cast<double*>(rows.data_ptr());

  // left for the kernels after the first: see trusted.h
  const int64_t all = t.batch * t.pixels();
  std::vector<Tensor> kept;
  const auto keep = [&](int64_t n) {
    kept.push_back(empty({n}));
    return static_cast<R*>(kept.back().data_ptr());
  };
  if (gathers) {
    t.top = keep(all);
    t.factor = keep(all);
  }
  if (gathers || learned || (want_seg && t.layers > cuda::kHeldLayers)) {
    t.share = keep(all * t.layers);
    if (any_transition) t.layer_top = keep(all * t.layers);
  }

  const bool nothing = all == 0;
  if (!nothing) check(cuda::trusted_pixels(t, stream));
  if (gathers) {
    if (nothing) {
      check(cuda::fill_zero(t.gradient, like.numel() * coarse::bytes_of(t.storage), stream));
    } else {
      check(cuda::trusted_gather(t, stream));
    }
  }
  if (learned) {
    const int64_t entries = static_cast<int64_t>(t.classes) * t.classes;
    const int64_t slices = nothing ? 1 : cuda::trusted_slices(t);
    for (size_t k = 0; k < count; ++k) {
      Tensor& gradient = transition_gradients[k];
      if (gradient.dim() != 2) continue;
      const Tensor partial = zeros(slices * entries);
      coarse::Stream<R> s;  // what adds the slices up knows no other
      s.classes = t.classes;
      s.transition_gradient = static_cast<double*>(partial.data_ptr());
      if (!nothing) check(cuda::trusted_transition(t, static_cast<int>(k), slices, s.transition_gradient, stream));
      check(cuda::finish_transition(s, slices, static_cast<R*>(gradient.data_ptr()), stream));
    }
  }
  if (!per_pixel) check(cuda::finish_trusted(t, sums, stream));
  return {loss, nll, seg_gradient, transition_gradients};
}

TrustedOutput trusted(Tensor seg_logits, Tensors labels, Tensors transition, Tensors class_weight, Tensors pixel_weight,
                      Tensors scale, std::vector<double> weight, int64_t ignore_index, bool per_pixel, int64_t wanted) {
  Inputs in{seg_logits, labels, {}, transition, class_weight, pixel_weight, scale};
  for (size_t k = 0; k < labels.size(); ++k)
    in.cm_logits.push_back(new_tensor(seg_logits, {0}, seg_logits.scalar_type()));
  return in.wide() ? trusted_nll<double>(std::move(in), weight, ignore_index, per_pixel, wanted)
                   : trusted_nll<float>(std::move(in), weight, ignore_index, per_pixel, wanted);
}

template <class R>
Tensor most_probable(Tensor seg_logits, const std::vector<int64_t>& size) {
  Problem<R> problem = describe_logits<R>(seg_logits, size);
  std::vector<int64_t> shape{problem.batch};
  shape.insert(shape.end(), size.begin(), size.end());
  const OnDevice device(seg_logits);
  Tensor result = new_tensor(seg_logits, shape, problem.classes <= 256 ? ScalarType::Byte : ScalarType::Long);
  Trusted<R> t = on_device(problem);
  t.label_map = result.data_ptr();
  if (result.numel() > 0) check(cuda::trusted_labels(t, device.stream));
  return result;
}

Tensor label_map(Tensor seg_logits, std::vector<int64_t> size) {
  const bool wide = seg_logits.scalar_type() == ScalarType::Double;
  return wide ? most_probable<double>(seg_logits, size) : most_probable<float>(seg_logits, size);
}

}  // namespace

COARSE_OPERATORS {
  m.impl("trusted", TORCH_BOX(&trusted));
  m.impl("label_map", TORCH_BOX(&label_map));
}
