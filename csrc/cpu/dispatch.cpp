#include <cstdlib>
#include <cstring>

#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>

#include "kernel_set.h"

namespace coarse {
namespace {

constexpr int64_t kLeastCache = int64_t{256} << 10, kMostCache = int64_t{1} << 20;

int64_t look_up_cache() {
  long bytes = 0;  // some systems do not say
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes <= 0 ? kMostCache : std::clamp<int64_t>(bytes, kLeastCache, kMostCache);
}

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

int64_t second_level_cache() {
  static const int64_t bytes = look_up_cache();  // a virtual machine may take long to say it
  return bytes;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace coarse
