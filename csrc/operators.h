// The operators' bodies (operator.py has the schemas), once for every device: tensors in, the problem described and its
// outputs allocated, the device's part, tensors out.
//
//   struct Device {
//     static Tensor output(const Tensor& like, const std::vector<int64_t>& size, ScalarType);  // may be large
//     template <class R> static void objective(Call<R>&);  // fills every output
//     template <class R> static void run(Call<R>&);        // the posterior or the label map of its problem
//     template <class R> static void kernels(Call<R>&, int64_t* out);  // four numbers for each kind
//     template <class R> static void weigh(const Tensor& labels, const R* class_weight, const R* pixel_weight,
//                                          int64_t classes, int64_t ignore_index, Tensor& sum);
//   };
#pragma once

#include <tuple>
#include <utility>

#include "describe.h"

namespace {

using Tensors = std::vector<Tensor>;
using Outputs = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensors, Tensors>;

// A call of `annotation_objective`: `Arguments` and `Outputs` of operator.py, and both described as a problem.
template <class R>
struct Call {
  Inputs in;
  std::vector<double> weight, trace_weight;
  bool per_pixel = false;

  std::vector<Drawings<R>> kinds;
  Problem<R> problem;

  Tensor loss;
  Tensors losses, nll, trace;
  Tensor seg_gradient;
  Tensors cm_gradient, transition_gradient;

  const Tensor& like() const { return in.seg_logits; }
  Tensor empty(std::vector<int64_t> size) const { return new_tensor(like(), std::move(size), dtype_of<R>()); }
  bool wants_transition(size_t k) const { return transition_gradient[k].dim() == 2; }
};

template <class R>
R* data_of(const Tensor& t) {
  return static_cast<R*>(t.data_ptr());
}

template <class Device, class R>
Outputs objective(Inputs in, std::vector<double> weight, std::vector<double> trace_weight, int64_t ignore_index,
                  bool per_pixel, int64_t wanted) {
  const size_t count = in.kinds();
  STD_TORCH_CHECK(weight.size() == count && trace_weight.size() == count && in.class_weight.size() == count &&
                      in.pixel_weight.size() == count && in.scale.size() == count,
                  "one element for each kind of drawings");
  Call<R> call;
  call.in = std::move(in);
  call.weight = std::move(weight);
  call.trace_weight = std::move(trace_weight);
  call.per_pixel = per_pixel;
  call.problem = describe<R>(call.in, ignore_index, call.kinds);
  const auto gradient_of = [](const Tensor& t, Field& field) {
    Tensor gradient = Device::output(t, sizes_of(t), t.scalar_type());
    field.gradient = gradient.data_ptr();
    return gradient;
  };
  call.loss = call.empty(per_pixel ? std::vector<int64_t>{0} : std::vector<int64_t>{});
  call.seg_gradient = wanted & kSeg ? gradient_of(call.in.seg_logits, call.problem.seg) : call.empty({0});
  for (size_t k = 0; k < count; ++k) {
    Drawings<R>& kind = call.kinds[k];
    const auto bit = static_cast<int64_t>(k);
    const std::vector<int64_t> shape = per_pixel ? sizes_of(call.in.labels[k]) : std::vector<int64_t>{};
    for (Tensors* terms : {&call.losses, &call.nll, &call.trace}) terms->push_back(call.empty(shape));
    const bool want_cm = (wanted & cm_bit(bit)) != 0 && present(call.in.cm_logits[k]);
    const bool want_transition = (wanted & transition_bit(bit)) != 0 && kind.transition != nullptr;
    call.cm_gradient.push_back(want_cm ? gradient_of(call.in.cm_logits[k], kind.field) : call.empty({0}));
    const int64_t c = call.problem.classes;
    call.transition_gradient.push_back(
        call.empty(want_transition ? std::vector<int64_t>{c, c} : std::vector<int64_t>{0}));
    kind.trace_weight = static_cast<R>(call.trace_weight[k]);
    Tensor& scale = call.in.scale[k];
    STD_TORCH_CHECK(!present(scale) || (scale.scalar_type() == dtype_of<R>() && scale.numel() == 1),
                    "scale: expected one value in the compute dtype");
    if (!per_pixel) continue;
    kind.nll_map = data_of<R>(call.nll[k]);
    kind.trace_map = data_of<R>(call.trace[k]);
  }
  Device::objective(call);
  return {call.loss, call.losses, call.nll, call.trace, call.seg_gradient, call.cm_gradient, call.transition_gradient};
}

template <class Device>
Outputs annotation_objective(Tensor seg_logits, Tensors labels, Tensors cm_logits, Tensors transition,
                             Tensors class_weight, Tensors pixel_weight, Tensors scale, std::vector<double> weight,
                             std::vector<double> trace_weight, int64_t ignore_index, bool per_pixel, int64_t wanted) {
  Inputs in{seg_logits, labels, cm_logits, transition, class_weight, pixel_weight, scale};
  return in.wide() ? objective<Device, double>(std::move(in), weight, trace_weight, ignore_index, per_pixel, wanted)
                   : objective<Device, float>(std::move(in), weight, trace_weight, ignore_index, per_pixel, wanted);
}

template <class Device, class R>
Tensor posterior(Inputs in, int64_t ignore_index) {
  Call<R> call;
  call.in = std::move(in);
  call.problem = describe<R>(call.in, ignore_index, call.kinds);
  std::vector<int64_t> size = sizes_of(call.in.labels[0]);
  size[1] = call.problem.classes;
  Tensor result = Device::output(call.like(), size, call.like().scalar_type());
  call.problem.posterior = result.data_ptr();
  Device::run(call);
  return result;
}

template <class Device>
Tensor objective_posterior(Tensor seg_logits, Tensors labels, Tensors cm_logits, Tensors transition,
                           int64_t ignore_index) {
  Inputs in{seg_logits, labels, cm_logits, transition, {}, {}, {}};
  return in.wide() ? posterior<Device, double>(std::move(in), ignore_index)
                   : posterior<Device, float>(std::move(in), ignore_index);
}

// int64 (kinds, 4): which kernel each kind of drawings gets and why not a faster one, in numbers of the device's that
// its backend puts into words. Nothing is computed; what would be wanted is pointed to, and not to be written.
template <class Device, class R>
Tensor chosen_kernels(Inputs in, int64_t wanted) {
  Call<R> call;
  call.in = std::move(in);
  call.problem = describe<R>(call.in, 255, call.kinds);
  STD_TORCH_CHECK(call.problem.batch > 0 && call.problem.pixels() > 0, "labels: expected at least one pixel");
  call.weight.assign(call.kinds.size(), 1.0);
  const auto absent = [&] { return call.empty({0}); };
  call.seg_gradient = wanted & kSeg ? call.in.seg_logits : absent();
  for (size_t k = 0; k < call.kinds.size(); ++k) {
    const auto bit = static_cast<int64_t>(k);
    Field& field = call.kinds[k].field;
    if (wanted & cm_bit(bit)) field.gradient = const_cast<void*>(field.data);
    const bool want_transition = (wanted & transition_bit(bit)) != 0 && call.kinds[k].transition != nullptr;
    call.transition_gradient.push_back(want_transition ? call.in.transition[k] : absent());
  }
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  Tensor result =
      torch::stable::empty({static_cast<int64_t>(call.kinds.size()), 4}, ScalarType::Long, std::nullopt, host);
  Device::kernels(call, data_of<int64_t>(result));
  return result;
}

template <class Device>
Tensor kernels_of(Tensor seg_logits, Tensors labels, Tensors cm_logits, Tensors transition, int64_t wanted) {
  Inputs in{seg_logits, labels, cm_logits, transition, {}, {}, {}};
  return in.wide() ? chosen_kernels<Device, double>(std::move(in), wanted)
                   : chosen_kernels<Device, float>(std::move(in), wanted);
}

template <class Device, class R>
Tensor most_probable(Tensor seg_logits, const std::vector<int64_t>& size) {
  Call<R> call;
  call.in.seg_logits = seg_logits;
  call.problem = describe_logits<R>(call.in.seg_logits, size);
  std::vector<int64_t> shape{call.problem.batch};
  shape.insert(shape.end(), size.begin(), size.end());
  const bool byte = call.problem.classes <= 256;
  Tensor result = new_tensor(seg_logits, shape, byte ? ScalarType::Byte : ScalarType::Long);
  call.problem.label_map = result.data_ptr();
  call.problem.label_map_type = byte ? coarse::LabelType::u8 : coarse::LabelType::i64;
  Device::run(call);
  return result;
}

template <class Device>
Tensor label_map(Tensor seg_logits, std::vector<int64_t> size) {
  const bool wide = seg_logits.scalar_type() == ScalarType::Double;
  return wide ? most_probable<Device, double>(seg_logits, size) : most_probable<Device, float>(seg_logits, size);
}

template <class Device, class R>
Tensor weigh(Tensor labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t classes,
             int64_t ignore_index) {
  const R* by_class = class_weight.has_value() ? constant<R>(*class_weight, classes, "class_weight") : nullptr;
  const R* by_pixel = pixel_weight.has_value() ? constant<R>(*pixel_weight, labels.numel(), "pixel_weight") : nullptr;
  Tensor sum = new_tensor(labels, {}, ScalarType::Double);
  Device::weigh(labels, by_class, by_pixel, classes, ignore_index, sum);
  return sum;
}

// 0-d float64: the sum of class_weight[label] * pixel_weight over labelled pixels.
template <class Device>
Tensor labelled_weight(Tensor labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t num_classes,
                       int64_t ignore_index) {
  labels = torch::stable::contiguous(labels);
  const Tensor* any = class_weight.has_value() ? &*class_weight : pixel_weight.has_value() ? &*pixel_weight : nullptr;
  const bool wide = any != nullptr && any->scalar_type() == ScalarType::Double;
  return wide ? weigh<Device, double>(labels, class_weight, pixel_weight, num_classes, ignore_index)
              : weigh<Device, float>(labels, class_weight, pixel_weight, num_classes, ignore_index);
}

}  // namespace

// Of every device, in a block of STABLE_TORCH_LIBRARY_IMPL.
#define COARSE_IMPLEMENT(m, Device)                                         \
  m.impl("annotation_objective", TORCH_BOX(&annotation_objective<Device>)); \
  m.impl("objective_posterior", TORCH_BOX(&objective_posterior<Device>));   \
  m.impl("kernels_of", TORCH_BOX(&kernels_of<Device>));                     \
  m.impl("label_map", TORCH_BOX(&label_map<Device>));                       \
  m.impl("labelled_weight", TORCH_BOX(&labelled_weight<Device>))
