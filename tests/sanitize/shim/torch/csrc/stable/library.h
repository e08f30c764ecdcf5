#pragma once

#include "tensor.h"

namespace torch::stable {
struct Library {
  template <class F>
  void impl(const char*, F) {}
};
}  // namespace torch::stable

#define TORCH_BOX(function) (function)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name(torch::stable::Library& m)
