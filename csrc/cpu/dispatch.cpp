#include <cstdlib>
#include <cstring>

#include "kernel_set.h"

namespace coarse {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("COARSE_KERNELS_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto allows = [&](const char* isa) { return any || std::strcmp(wanted, isa) == 0; };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allows("avx512")) return kKernelsAvx512;
  if (avx2 && (allows("avx2") || allows("avx512"))) return kKernelsAvx2;
#endif
  return kKernelsBaseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace coarse
