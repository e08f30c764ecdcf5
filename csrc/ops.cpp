// The operators of `torch.ops.coarse_kernels`, on the LibTorch stable ABI: tensors in, a plan of tasks, tensors out.
// The mathematics is in coarse_math.h, the kernels in cpu/.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run.h"

namespace {

// --- operators -------------------------------------------------------------------------------------------------------

using NllOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
NllOutput nll(Inputs inputs, const OptionalTensor& scale, double loss_scale, double trace_weight, int64_t ignore_index,
              bool per_pixel, int64_t wanted) {
  Run<R> run(std::move(inputs), ignore_index);
  Stream<R>& s = run.stream();
  const Tensor& like = run.inputs().seg_logits;
  const double factor = scalar_value<R>(scale);
  s.trace_weight = static_cast<R>(trace_weight);
  s.gradient_scale = static_cast<R>(factor * loss_scale);

  const auto absent = [&] { return new_tensor(like, {0}, dtype_of<R>()); };
  const std::vector<int64_t> shape = per_pixel ? sizes_of(run.inputs().labels) : std::vector<int64_t>{};
  Tensor loss = new_tensor(like, shape, dtype_of<R>());
  Tensor nll = new_tensor(like, shape, dtype_of<R>());
  Tensor trace = new_tensor(like, shape, dtype_of<R>());
  R* const loss_data = static_cast<R*>(loss.data_ptr());
  R* const nll_data = static_cast<R*>(nll.data_ptr());
  R* const trace_data = static_cast<R*>(trace.data_ptr());
  if (per_pixel) {
    s.nll_map = nll_data;
    s.trace_map = trace_data;
  }
  Tensor seg_gradient = wanted & kSeg ? run.want_seg_gradient() : absent();
  Tensor cm_gradient = wanted & kCm ? run.want_cm_gradient() : absent();
  if (wanted & kTransition) run.want_transition_gradient();

  const Totals totals = run.run();

  Tensor transition_gradient = absent();
  if (wanted & kTransition) {
    transition_gradient = new_tensor(like, {s.classes, s.classes}, dtype_of<R>());
    R* out = static_cast<R*>(transition_gradient.data_ptr());
    for (size_t k = 0; k < totals.transition_gradient.size(); ++k)
      out[k] = static_cast<R>(totals.transition_gradient[k]);
  }
  if (per_pixel) {
    for (int64_t k = 0; k < loss.numel(); ++k) {
      loss_data[k] = static_cast<R>(factor * loss_scale) * (nll_data[k] + s.trace_weight * trace_data[k]);
    }
  } else {
    // a weight of 0 counts for nothing, even if the sum is inf
    const auto scaled = [](double weight, double sum) { return weight == 0 ? R(0) : static_cast<R>(weight * sum); };
    *nll_data = scaled(factor, totals.nll);
    *trace_data = scaled(factor, totals.trace);
    *loss_data = scaled(factor * loss_scale, totals.nll + trace_weight * totals.trace);
  }
  return {loss, nll, trace, seg_gradient, cm_gradient, transition_gradient};
}

NllOutput annotation_nll(Tensor seg_logits, Tensor cm_logits, Tensor labels, OptionalTensor transition,
                         OptionalTensor class_weight, OptionalTensor pixel_weight, OptionalTensor scale,
                         double loss_scale, double trace_weight, int64_t ignore_index, bool per_pixel, int64_t wanted) {
  const bool wide = cm_logits.scalar_type() == ScalarType::Double;
  Inputs inputs{seg_logits, cm_logits, labels, transition, class_weight, pixel_weight};
  return wide ? nll<double>(std::move(inputs), scale, loss_scale, trace_weight, ignore_index, per_pixel, wanted)
              : nll<float>(std::move(inputs), scale, loss_scale, trace_weight, ignore_index, per_pixel, wanted);
}

template <class R>
Tensor posterior(Inputs inputs, int64_t ignore_index) {
  Run<R> run(std::move(inputs), ignore_index);
  const Tensor& like = run.inputs().seg_logits;
  Tensor result = new_tensor(like, sizes_of(like), like.scalar_type());
  run.stream().posterior = result.data_ptr();
  run.run();
  return result;
}

Tensor annotation_posterior(Tensor seg_logits, Tensor cm_logits, Tensor labels, OptionalTensor transition,
                            int64_t ignore_index) {
  const bool wide = cm_logits.scalar_type() == ScalarType::Double;
  Inputs inputs{seg_logits, cm_logits, labels, transition, std::nullopt, std::nullopt};
  return wide ? posterior<double>(std::move(inputs), ignore_index) : posterior<float>(std::move(inputs), ignore_index);
}

coarse::LabelScan scan(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  return coarse::kernels().scan_labels(labels.data_ptr(), label_type_of(labels), labels.numel(), ignore_index, classes);
}

template <class R>
double weigh(const Tensor& labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t classes,
             int64_t ignore_index) {
  const R* by_class = constant<R>(class_weight, classes, "class_weight");
  const R* by_pixel = constant<R>(pixel_weight, labels.numel(), "pixel_weight");
  const bool byte = label_type_of(labels) == coarse::LabelType::u8;
  const void* data = labels.data_ptr();
  double sum = 0;
  for (int64_t k = 0; k < labels.numel(); ++k) {
    const int64_t y = byte ? static_cast<const uint8_t*>(data)[k] : static_cast<const int64_t*>(data)[k];
    if (y == ignore_index || y < 0 || y >= classes) continue;  // annotation_nll complains of the others
    // in R, as the kernels weigh it
    const R weight = (by_class != nullptr ? by_class[y] : R(1)) * (by_pixel != nullptr ? by_pixel[k] : R(1));
    sum += static_cast<double>(weight);
  }
  return sum;
}

// 0-d float64: the sum of class_weight[label] * pixel_weight over labelled pixels.
Tensor labelled_weight(Tensor labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t num_classes,
                       int64_t ignore_index) {
  labels = torch::stable::contiguous(labels);
  Tensor result = new_tensor(labels, {}, ScalarType::Double);
  double* sum = static_cast<double*>(result.data_ptr());
  const Tensor* any = class_weight.has_value() ? &*class_weight : pixel_weight.has_value() ? &*pixel_weight : nullptr;
  if (any == nullptr) {
    *sum = scan(labels, ignore_index, num_classes).weight;
  } else if (any->scalar_type() == ScalarType::Double) {
    *sum = weigh<double>(labels, class_weight, pixel_weight, num_classes, ignore_index);
  } else {
    *sum = weigh<float>(labels, class_weight, pixel_weight, num_classes, ignore_index);
  }
  return result;
}

// int64 (2,): 1 and the first label outside [0, num_classes) that is not ignore_index, or 0 and 0.
Tensor find_bad_label(Tensor labels, int64_t num_classes, int64_t ignore_index) {
  labels = torch::stable::contiguous(labels);
  Tensor result = new_tensor(labels, {2}, ScalarType::Long);
  const coarse::LabelScan found = scan(labels, ignore_index, num_classes);
  int64_t* out = static_cast<int64_t*>(result.data_ptr());
  out[0] = found.bad;
  out[1] = found.label;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coarse_kernels, CPU, m) {
  m.impl("annotation_nll", TORCH_BOX(&annotation_nll));
  m.impl("annotation_posterior", TORCH_BOX(&annotation_posterior));
  m.impl("labelled_weight", TORCH_BOX(&labelled_weight));
  m.impl("find_bad_label", TORCH_BOX(&find_bad_label));
}

// Importing the module registers the operators. Its one attribute is the chosen kernels, for `_native` to look at.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  void* kernels = const_cast<void*>(static_cast<const void*>(&coarse::kernels()));
  PyObject* capsule = PyCapsule_New(kernels, "coarse_kernels._C.kernels", nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "kernels", capsule) < 0) return nullptr;
  return module;
}
