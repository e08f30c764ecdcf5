// The operators of `torch.ops.coarse_kernels` on CUDA tensors, on the LibTorch stable ABI. Their bodies are in
// operators.h.
//
// The emulator's tests build this very file for CPU tensors (COARSE_EMULATED), in a namespace of operators of its own.
#include "run.h"

namespace {

struct Cuda {
  // PyTorch's allocator keeps what is freed
  static Tensor output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
    return new_tensor(like, size, dtype);
  }

  template <class R>
  static void objective(Call<R>& call) {
    Run<R>(call).objective();
  }

  template <class R>
  static void run(Call<R>& call) {
    Run<R> run(call);
    if (call.problem.label_map != nullptr) {
      run.label_map();
    } else {
      run.posterior();
    }
  }

  template <class R>
  static void kernels(Call<R>& call, int64_t* out) {
    Run<R>(call).kernels(out);
  }

  template <class R>
  static void weigh(const Tensor& labels, const R* class_weight, const R* pixel_weight, int64_t classes,
                    int64_t ignore_index, Tensor& sum) {
    const OnDevice device(labels);
    Layer<R> s;
    s.classes = static_cast<int>(classes);
    s.labels = labels.data_ptr();
    s.label_type = label_type_of(labels);
    s.ignore_index = ignore_index;
    s.class_weight = class_weight;
    s.pixel_weight = pixel_weight;
    const Tensor partial = new_tensor(labels, {cuda::kWeightRows}, ScalarType::Double);
    check(cuda::label_weight(s, labels.numel(), data_of<double>(partial), data_of<double>(sum), device.stream));
  }
};

// gradient *= factor, a 0-d tensor on the same device whose value the host does not learn; where it is 1, as it mostly
// is, no memory moves.
template <class R>
void scale_by(const Tensor& gradient, Tensor factor) {
  const OnDevice device(gradient);
  const R* const by = constant<R>(factor, 1, "factor");
  check(cuda::scale(gradient.data_ptr(), storage_of(gradient, "gradient"), gradient.numel(), by, device.stream));
}

void scale_(Tensor gradient, Tensor factor) {
  STD_TORCH_CHECK(gradient.is_contiguous() && factor.numel() == 1, "scale_: a contiguous gradient and one factor");
  return gradient.scalar_type() == ScalarType::Double ? scale_by<double>(gradient, factor)
                                                      : scale_by<float>(gradient, factor);
}

}  // namespace

COARSE_OPERATORS {
  COARSE_IMPLEMENT(m, Cuda);
  m.impl("scale_", TORCH_BOX(&scale_));
}

// Importing the module registers the operators.
#if !defined(COARSE_EMULATED)
#include <Python.h>

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED  // as in _C
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
#endif
