// `coarse_kernels._native`: the native code seen from NumPy, without torch. Facts about the machine and the build, the
// machine's own limits (cpu/limits.h), and the shared mathematics (coarse_math.h) for the tests to hold against
// NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "coarse_math.h"
#include "cpu/kernel_set.h"
#include "cpu/limits.h"

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// The kernels that `_C` chose for this machine; this module holds none of its own. Asked for as the module is imported.
const coarse::Kernels* chosen_kernels = nullptr;
const coarse::Kernels& kernels() { return *chosen_kernels; }

py::dict cpu_info() {
  py::dict info;
  info["isa"] = kernels().isa;
  info["simd_bytes"] = kernels().simd_bytes;
  py::list supported;
  supported.append("baseline");
#if defined(__x86_64__)
  __builtin_cpu_init();
  // as cpu/dispatch.cpp asks
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) supported.append("avx2");
  if (avx512) supported.append("avx512");
#endif
  info["supported"] = supported;
  return info;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
  info["architecture"] = "x86_64";
#elif defined(__aarch64__)
  info["architecture"] = "aarch64";
#else
  info["architecture"] = "other";
#endif
  return info;
}

template <class F>
FloatArray mapped(const FloatArray& x, F f) {
  FloatArray y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  f(x.data(), y.mutable_data(), static_cast<int64_t>(x.size()));
  return y;
}

py::tuple linear_taps(int64_t grid, int64_t pixels, bool wide, bool exact) {
  if (grid < 1 || pixels < grid) throw std::invalid_argument("grid: expected 1 <= grid <= pixels");
  py::array_t<int64_t> i0(pixels), i1(pixels);
  py::array_t<double> lambda(pixels);
  for (int64_t k = 0; k < pixels; ++k) {
    const auto fill = [&](auto tap) {
      i0.mutable_at(k) = tap.i0;
      i1.mutable_at(k) = tap.i1;
      lambda.mutable_at(k) = static_cast<double>(tap.lambda);
    };
    if (exact) {
      wide ? fill(coarse::exact_tap<double>(k, grid, pixels)) : fill(coarse::exact_tap<float>(k, grid, pixels));
    } else {
      wide ? fill(coarse::linear_tap<double>(k, grid, pixels)) : fill(coarse::linear_tap<float>(k, grid, pixels));
    }
  }
  return py::make_tuple(i0, i1, lambda);
}

// The log-space path on one pixel: seg_logits (C), cm_logits (C, C), reported (C) = T[:, y].
template <class R>
py::dict pixel(py::array_t<R, py::array::c_style | py::array::forcecast> seg_logits,
               py::array_t<R, py::array::c_style | py::array::forcecast> cm_logits,
               py::array_t<R, py::array::c_style | py::array::forcecast> reported, double trace_weight) {
  const auto c = static_cast<int>(seg_logits.size());
  if (seg_logits.ndim() != 1 || cm_logits.ndim() != 2 || cm_logits.shape(0) != c || cm_logits.shape(1) != c ||
      reported.ndim() != 1 || reported.shape(0) != c) {
    throw std::invalid_argument("expected seg_logits (C), cm_logits (C, C), reported (C)");
  }
  py::array_t<R> gradient({c, c}), p(c), r(c), transition_gradient(c);
  std::memcpy(gradient.mutable_data(), cm_logits.data(), sizeof(R) * static_cast<size_t>(c) * c);
  std::vector<coarse::Reported<R>> t(c);
  std::vector<coarse::ColumnTerms<R>> columns(c);
  for (int i = 0; i < c; ++i) t[i] = {reported.at(i), std::log(reported.at(i))};
  const auto terms = coarse::pixel_log_space<R>(c, seg_logits.data(), gradient.mutable_data(), t.data(), R(1),
                                                static_cast<R>(trace_weight), p.mutable_data(), r.mutable_data(),
                                                columns.data(), transition_gradient.mutable_data());
  py::dict result;
  result["nll"] = terms.nll;
  result["trace"] = terms.trace;
  result["p"] = p;
  result["posterior"] = r;
  result["cm_gradient"] = gradient;
  result["transition_gradient"] = transition_gradient;
  return result;
}

// A limit as Python calls it: the lock is released, but only once the kernels are there, which may import a module.
template <class... Arguments>
auto unlocked(double (*limit)(const coarse::Kernels&, Arguments...)) {
  return [limit](Arguments... arguments) {
    const coarse::Kernels& chosen = kernels();
    py::gil_scoped_release release;
    return limit(chosen, arguments...);
  };
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  chosen_kernels = static_cast<const coarse::Kernels*>(PyCapsule_Import("coarse_kernels._C.kernels", 0));
  if (chosen_kernels == nullptr) throw py::error_already_set();
  m.doc() = "Native code of coarse_kernels seen from NumPy: facts, limits, and the shared per-pixel mathematics.";
  m.attr("EXP_ULP") = coarse::kExpUlp;
  m.attr("LOG_ULP") = coarse::kLogUlp;
  m.attr("EXP_FLUSH") = coarse::kExpFlush;
  m.def("cpu_info", &cpu_info, "Instruction set in use (isa, simd_bytes) and those that this machine supports.");
  m.def("build_info", &build_info, "Compiler, language standard and architecture of the build.");
  m.def(
      "exp", [](const FloatArray& x) { return mapped(x, kernels().exp_array); }, py::arg("x"),
      "The kernels' exp, float32: at most EXP_ULP for EXP_FLUSH <= x <= 88, 0 below.");
  m.def(
      "log", [](const FloatArray& x) { return mapped(x, kernels().log_array); }, py::arg("x"),
      "The kernels' log, float32: at most LOG_ULP for normal x > 0; -inf at 0.");
  m.def(
      "linear_taps", &linear_taps, py::arg("grid"), py::arg("pixels"), py::arg("wide") = false,
      py::arg("exact") = false,
      "(i0, i1, lambda) of every pixel of an axis: value = (1 - lambda) x[i0] + lambda x[i1]. wide: in float64. exact: "
      "lambda as a quotient of integers, as the CPU's kernels have it, instead of the fraction of a coordinate.");
  m.def("pixel_f32", &pixel<float>, py::arg("seg_logits"), py::arg("cm_logits"), py::arg("reported"),
        py::arg("trace_weight") = 0.0, "One pixel in log space, float32; reported = T[:, y].");
  m.def("pixel_f64", &pixel<double>, py::arg("seg_logits"), py::arg("cm_logits"), py::arg("reported"),
        py::arg("trace_weight") = 0.0, "One pixel in log space, float64; reported = T[:, y].");
  m.def("copy_bandwidth", unlocked(&coarse::copy_bandwidth), py::arg("megabytes") = 128, py::arg("repeats") = 7,
        py::arg("threads") = 1, "Bytes per second, read plus written, of a streaming copy: the best of `repeats`.");
  m.def("read_bandwidth", unlocked(&coarse::read_bandwidth), py::arg("megabytes") = 128, py::arg("repeats") = 7,
        py::arg("threads") = 1, "Bytes per second of the sum of a float32 array: the best of `repeats`.");
  m.def("exp_throughput", unlocked(&coarse::exp_throughput), py::arg("repeats") = 7, py::arg("threads") = 1,
        "Exponentials per second, float32, in cache: the best of `repeats`.");
  m.def("fma_throughput", unlocked(&coarse::fma_throughput), py::arg("repeats") = 7, py::arg("threads") = 1,
        "Multiply-adds per second, float32, in registers; each lane counts: the best of `repeats`.");
}
