// The operators of `torch.ops.coarse_kernels` on CPU tensors, on the LibTorch stable ABI: tensors in, a plan of tasks,
// tensors out. The schemas are in operator.py, the mathematics in coarse_math.h.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run.h"

namespace {

// --- operators -------------------------------------------------------------------------------------------------------

using Tensors = std::vector<Tensor>;
using Outputs = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensors, Tensors>;

template <class R>
double scalar_value(const Tensor& t) {
  if (!present(t)) return 1.0;
  STD_TORCH_CHECK(t.scalar_type() == dtype_of<R>() && t.numel() == 1, "scale: expected one value in the compute dtype");
  return static_cast<double>(*static_cast<const R*>(t.data_ptr()));
}

template <class R>
Outputs objective(Inputs in, const std::vector<double>& weight, const std::vector<double>& trace_weight,
                  int64_t ignore_index, bool per_pixel, int64_t wanted) {
  const size_t count = in.kinds();
  STD_TORCH_CHECK(weight.size() == count && trace_weight.size() == count && in.class_weight.size() == count &&
                      in.pixel_weight.size() == count && in.scale.size() == count,
                  "one element for each kind of drawings");
  std::vector<Drawings<R>> kinds;
  Problem<R> problem = describe<R>(in, ignore_index, kinds);
  const Tensor& like = in.seg_logits;
  const auto absent = [&] { return new_tensor(like, {0}, dtype_of<R>()); };
  const auto gradient_of = [&](const Tensor& t, Field& field) {
    Tensor gradient = new_tensor(t, sizes_of(t), t.scalar_type());
    field.gradient = gradient.data_ptr();
    return gradient;
  };

  Tensor seg_gradient = wanted & kSeg ? gradient_of(in.seg_logits, problem.seg) : absent();
  Tensors losses, nlls, traces, cm_gradients, transition_gradients;
  std::vector<bool> want_transition;
  for (size_t k = 0; k < count; ++k) {
    Drawings<R>& kind = kinds[k];
    const auto bit = static_cast<int64_t>(k);
    const std::vector<int64_t> shape = per_pixel ? sizes_of(in.labels[k]) : std::vector<int64_t>{};
    for (Tensors* terms : {&losses, &nlls, &traces}) terms->push_back(new_tensor(like, shape, dtype_of<R>()));
    const bool want_cm = (wanted & cm_bit(bit)) != 0 && present(in.cm_logits[k]);
    cm_gradients.push_back(want_cm ? gradient_of(in.cm_logits[k], kind.field) : absent());
    want_transition.push_back((wanted & transition_bit(bit)) != 0 && kind.transition != nullptr);
    kind.trace_weight = static_cast<R>(trace_weight[k]);
    kind.gradient_scale = static_cast<R>(scalar_value<R>(in.scale[k]) * weight[k]);
    if (!per_pixel) continue;
    kind.nll_map = static_cast<R*>(nlls[k].data_ptr());
    kind.trace_map = static_cast<R*>(traces[k].data_ptr());
  }

  const std::vector<Totals> totals = Run<R>(problem, kinds, like, want_transition).run();

  // a weight of 0 counts for nothing, even if the sum is inf
  const auto scaled = [](double by, double sum) { return by == 0 ? 0.0 : by * sum; };
  double total = 0;
  for (size_t k = 0; k < count; ++k) {
    R* const loss = static_cast<R*>(losses[k].data_ptr());
    R* const nll = static_cast<R*>(nlls[k].data_ptr());
    R* const trace = static_cast<R*>(traces[k].data_ptr());
    if (per_pixel) {
      for (int64_t n = 0; n < losses[k].numel(); ++n) loss[n] = nll[n] + kinds[k].trace_weight * trace[n];
    } else {
      const double factor = scalar_value<R>(in.scale[k]), sum = totals[k].nll + trace_weight[k] * totals[k].trace;
      *nll = static_cast<R>(scaled(factor, totals[k].nll));
      *trace = static_cast<R>(scaled(factor, totals[k].trace));
      *loss = static_cast<R>(scaled(factor, sum));
      total += scaled(factor * weight[k], sum);
    }
    transition_gradients.push_back(
        want_transition[k] ? new_tensor(like, {problem.classes, problem.classes}, dtype_of<R>()) : absent());
    R* const out = static_cast<R*>(transition_gradients[k].data_ptr());
    for (size_t n = 0; n < totals[k].transition_gradient.size(); ++n)
      out[n] = static_cast<R>(totals[k].transition_gradient[n]);
  }
  Tensor loss = per_pixel ? absent() : new_tensor(like, {}, dtype_of<R>());
  if (!per_pixel) *static_cast<R*>(loss.data_ptr()) = static_cast<R>(total);
  return {loss, losses, nlls, traces, seg_gradient, cm_gradients, transition_gradients};
}

Outputs annotation_objective(Tensor seg_logits, Tensors labels, Tensors cm_logits, Tensors transition,
                             Tensors class_weight, Tensors pixel_weight, Tensors scale, std::vector<double> weight,
                             std::vector<double> trace_weight, int64_t ignore_index, bool per_pixel, int64_t wanted) {
  Inputs in{seg_logits, labels, cm_logits, transition, class_weight, pixel_weight, scale};
  return in.wide() ? objective<double>(std::move(in), weight, trace_weight, ignore_index, per_pixel, wanted)
                   : objective<float>(std::move(in), weight, trace_weight, ignore_index, per_pixel, wanted);
}

template <class R>
Tensor posterior(Inputs in, int64_t ignore_index) {
  std::vector<Drawings<R>> kinds;
  Problem<R> problem = describe<R>(in, ignore_index, kinds);
  std::vector<int64_t> size = sizes_of(in.labels[0]);
  size[1] = problem.classes;
  Tensor result = new_tensor(in.seg_logits, size, in.seg_logits.scalar_type());
  problem.posterior = result.data_ptr();
  Run<R>(problem, kinds, in.seg_logits, std::vector<bool>(kinds.size(), false)).run();
  return result;
}

Tensor objective_posterior(Tensor seg_logits, Tensors labels, Tensors cm_logits, Tensors transition,
                           int64_t ignore_index) {
  Inputs in{seg_logits, labels, cm_logits, transition, {}, {}, {}};
  return in.wide() ? posterior<double>(std::move(in), ignore_index) : posterior<float>(std::move(in), ignore_index);
}

template <class R>
Tensor most_probable(Tensor seg_logits, const std::vector<int64_t>& size) {
  Problem<R> problem = describe_logits<R>(seg_logits, size);
  std::vector<int64_t> shape{problem.batch};
  shape.insert(shape.end(), size.begin(), size.end());
  const bool byte = problem.classes <= 256;
  Tensor result = new_tensor(seg_logits, shape, byte ? ScalarType::Byte : ScalarType::Long);
  problem.label_map = result.data_ptr();
  problem.label_map_type = byte ? coarse::LabelType::u8 : coarse::LabelType::i64;
  std::vector<Drawings<R>> none;
  Run<R>(problem, none, seg_logits, {}).run();
  return result;
}

// int64 (kinds, 4): which kernel each kind of drawings gets (Form), vectors of a row and of a slab that are worked on
// together, tasks. What `coarse_kernels.explain` puts into words.
template <class R>
Tensor chosen_kernels(Inputs in) {
  std::vector<Drawings<R>> kinds;
  Problem<R> problem = describe<R>(in, 255, kinds);
  STD_TORCH_CHECK(problem.batch > 0 && problem.pixels() > 0, "labels: expected at least one pixel");
  const coarse::Planned<R> planned(problem);
  const auto count = static_cast<int64_t>(kinds.size());
  Tensor result = new_tensor(in.seg_logits, {count, 4}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.data_ptr());
  for (int k = 0; k < problem.kind_count; ++k) {
    *out++ = static_cast<int64_t>(coarse::form_of(problem, planned.plan, k));
    *out++ = planned.plan.per_row;
    *out++ = planned.plan.vectors;
    *out++ = planned.plan.tasks();
  }
  return result;
}

Tensor kernels_of(Tensor seg_logits, Tensors labels, Tensors cm_logits) {
  Inputs in{seg_logits, labels, cm_logits, Tensors(labels.size(), new_tensor(seg_logits, {0}, ScalarType::Float)),
            {},         {},     {}};
  return in.wide() ? chosen_kernels<double>(std::move(in)) : chosen_kernels<float>(std::move(in));
}

Tensor label_map(Tensor seg_logits, std::vector<int64_t> size) {
  const bool wide = seg_logits.scalar_type() == ScalarType::Double;
  return wide ? most_probable<double>(seg_logits, size) : most_probable<float>(seg_logits, size);
}

coarse::LabelScan scan(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  return coarse::kernels().scan_labels(labels.data_ptr(), label_type_of(labels), labels.numel(), ignore_index, classes);
}

template <class R>
double weigh(const Tensor& labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t classes,
             int64_t ignore_index) {
  const R* by_class = class_weight.has_value() ? constant<R>(*class_weight, classes, "class_weight") : nullptr;
  const R* by_pixel = pixel_weight.has_value() ? constant<R>(*pixel_weight, labels.numel(), "pixel_weight") : nullptr;
  const bool byte = label_type_of(labels) == coarse::LabelType::u8;
  const void* data = labels.data_ptr();
  double sum = 0;
  for (int64_t k = 0; k < labels.numel(); ++k) {
    const int64_t y = byte ? static_cast<const uint8_t*>(data)[k] : static_cast<const int64_t*>(data)[k];
    if (y == ignore_index || y < 0 || y >= classes) continue;  // annotation_objective complains of the others
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
  m.impl("annotation_objective", TORCH_BOX(&annotation_objective));
  m.impl("objective_posterior", TORCH_BOX(&objective_posterior));
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("kernels_of", TORCH_BOX(&kernels_of));
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
