// Included ahead of the CPU operators where they are built for TSan and called from PyTorch: its parallel_for, as often
// as it may start threads and for loops of any length.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "shim/known_threads.h"

namespace torch::stable {

template <class F>
void parallel_for_of_known_threads(int64_t begin, int64_t end, int64_t /*grain*/, const F& f) {
  known_threads::split(begin, end, 1, 3, f);
}

}  // namespace torch::stable

#define parallel_for parallel_for_of_known_threads
