// The operators of a namespace, as operator.py has them too.
#pragma once

#include <torch/csrc/stable/library.h>

namespace {

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "annotation_nll(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, Tensor? class_weight, "
      "Tensor? pixel_weight, Tensor? scale, float loss_scale, float trace_weight, int ignore_index, bool per_pixel, "
      "int wanted) -> (Tensor loss, Tensor nll, Tensor trace, Tensor grad_seg, Tensor grad_cm, Tensor "
      "grad_transition)");
  m.def(
      "annotation_posterior(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, int ignore_index) "
      "-> Tensor");
  m.def(
      "labelled_weight(Tensor labels, Tensor? class_weight, Tensor? pixel_weight, int num_classes, int ignore_index) "
      "-> Tensor");
  // CUDA: a saved gradient that is given away, times the gradient of the loss
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
}

}  // namespace
