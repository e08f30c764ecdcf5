// What the operators on CUDA tensors share: errors, the device and its stream, the namespace that they are registered
// in.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "launch.h"

#if !defined(COARSE_EMULATED)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

namespace cuda = coarse::cuda;
using coarse::Storage;

void check(cuda::Error error) { STD_TORCH_CHECK(error == nullptr, "coarse_kernels, CUDA: ", error); }

#if defined(COARSE_EMULATED)
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
// The tensor's device, and the stream that PyTorch runs on there.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
                    "coarse_kernels, CUDA: no current stream on device ", t.get_device_index());
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

}  // namespace

#if defined(COARSE_EMULATED)
#define COARSE_OPERATORS STABLE_TORCH_LIBRARY_IMPL(coarse_kernels_emulated, CPU, m)
#else
#define COARSE_OPERATORS STABLE_TORCH_LIBRARY_IMPL(coarse_kernels, CUDA, m)
#endif
