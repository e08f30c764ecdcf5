// The operators of `torch.ops.coarse_kernels` on CPU tensors, on the LibTorch stable ABI. Their bodies are in
// operators.h, the mathematics in coarse_math.h.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "../operators.h"
#include "run.h"

namespace {

coarse::LabelScan scan(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  return coarse::kernels().scan_labels(labels.data_ptr(), label_type_of(labels), labels.numel(), ignore_index, classes);
}

struct Cpu {
  static Tensor output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
    return output_tensor(like, size, dtype);
  }

  template <class R>
  static void objective(Call<R>& call) {
    const size_t count = call.kinds.size();
    std::vector<double> scale;
    std::vector<bool> want_transition;
    for (size_t k = 0; k < count; ++k) {
      const Tensor& factor = call.in.scale[k];
      scale.push_back(present(factor) ? static_cast<double>(*data_of<R>(factor)) : 1.0);
      call.kinds[k].gradient_scale = static_cast<R>(scale[k] * call.weight[k]);
      want_transition.push_back(call.wants_transition(k));
    }
    const std::vector<Totals> totals = Run<R>(call.problem, call.kinds, call.like(), want_transition).run();

    // a weight of 0 counts for nothing, even if the sum is inf
    const auto scaled = [](double by, double sum) { return by == 0 ? 0.0 : by * sum; };
    double total = 0;
    for (size_t k = 0; k < count; ++k) {
      R* const loss = data_of<R>(call.losses[k]);
      R* const nll = data_of<R>(call.nll[k]);
      R* const trace = data_of<R>(call.trace[k]);
      if (call.per_pixel) {
        for (int64_t n = 0; n < call.losses[k].numel(); ++n) loss[n] = nll[n] + call.kinds[k].trace_weight * trace[n];
      } else {
        const double nll_sum = totals[k].nll.total(), trace_sum = totals[k].trace.total();
        const double sum = nll_sum + call.trace_weight[k] * trace_sum;
        *nll = static_cast<R>(scaled(scale[k], nll_sum));
        *trace = static_cast<R>(scaled(scale[k], trace_sum));
        *loss = static_cast<R>(scaled(scale[k], sum));
        total += scaled(scale[k] * call.weight[k], sum);
      }
      R* const out = data_of<R>(call.transition_gradient[k]);
      for (size_t n = 0; n < totals[k].transition_gradient.size(); ++n)
        out[n] = static_cast<R>(totals[k].transition_gradient[n]);
    }
    if (!call.per_pixel) *data_of<R>(call.loss) = static_cast<R>(total);
  }

  template <class R>
  static void run(Call<R>& call) {
    Run<R>(call.problem, call.kinds, call.like(), std::vector<bool>(call.kinds.size(), false)).run();
  }

  // Of a kind: its Form, vectors of a row and of a slab that are worked on together, tasks.
  template <class R>
  static void kernels(Call<R>& call, int64_t* out) {
    const coarse::Planned<R> planned(call.problem);
    for (int k = 0; k < call.problem.kind_count; ++k) {
      *out++ = static_cast<int64_t>(coarse::form_of(call.problem, planned.plan, k));
      *out++ = planned.plan.per_row;
      *out++ = planned.plan.vectors;
      *out++ = planned.plan.tasks();
    }
  }

  template <class R>
  static void weigh(const Tensor& labels, const R* by_class, const R* by_pixel, int64_t classes, int64_t ignore_index,
                    Tensor& result) {
    coarse::CompensatedSum sum;
    if (by_class == nullptr && by_pixel == nullptr) {
      sum.add(scan(labels, ignore_index, classes).weight);
    } else {
      const bool byte = label_type_of(labels) == coarse::LabelType::u8;
      const void* data = labels.data_ptr();
      for (int64_t k = 0; k < labels.numel(); ++k) {
        const int64_t y = byte ? static_cast<const uint8_t*>(data)[k] : static_cast<const int64_t*>(data)[k];
        if (y == ignore_index || y < 0 || y >= classes) continue;  // annotation_objective complains of the others
        // in R, as the kernels weigh it
        const R weight = (by_class != nullptr ? by_class[y] : R(1)) * (by_pixel != nullptr ? by_pixel[k] : R(1));
        sum.add(static_cast<double>(weight));
      }
    }
    *data_of<double>(result) = sum.total();
  }
};

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
  COARSE_IMPLEMENT(m, Cpu);
  m.impl("find_bad_label", TORCH_BOX(&find_bad_label));
}

namespace {

// pool_limit() -> bytes; pool_limit(bytes): sets it
PyObject* pool_limit(PyObject*, PyObject* arguments) {
  long long bytes = -1;
  if (PyArg_ParseTuple(arguments, "|L", &bytes) == 0) return nullptr;
  if (bytes >= 0) Pool::instance().set_limit(bytes);
  return PyLong_FromLongLong(Pool::instance().limit());
}

PyObject* pool_bytes(PyObject*, PyObject*) { return PyLong_FromLongLong(Pool::instance().idle_bytes()); }

PyObject* empty_pool(PyObject*, PyObject*) {
  Pool::instance().empty();
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {{"pool_limit", &pool_limit, METH_VARARGS, nullptr},
                          {"pool_bytes", &pool_bytes, METH_NOARGS, nullptr},
                          {"empty_pool", &empty_pool, METH_NOARGS, nullptr},
                          {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Importing the module registers the operators. It has the pool of large outputs (pool.py) and the chosen kernels:
// their instruction set by name, and for `_native` themselves.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef Py_GIL_DISABLED  // a free-threaded Python would take its lock back: the operators share the pool alone, which
                        // has its own
  PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  void* kernels = const_cast<void*>(static_cast<const void*>(&coarse::kernels()));
  PyObject* capsule = PyCapsule_New(kernels, "coarse_kernels._C.kernels", nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "kernels", capsule) < 0) return nullptr;
  if (PyModule_AddStringConstant(module, "isa", coarse::kernels().isa) < 0) return nullptr;
  return module;
}
