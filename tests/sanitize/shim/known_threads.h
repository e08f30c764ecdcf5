// Parallel loops by threads that TSan knows of. It does not see what orders the threads of OpenMP, and would call their
// work a race; what it is to find are races in ours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace known_threads {

template <class F>
void split(int64_t begin, int64_t end, int64_t grain, int64_t most, const F& f) {
  const int64_t n = end - begin, parts = (n + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = std::min(most, parts);
  if (n <= 0) return;
  if (threads <= 1) return f(begin, end);
  const int64_t each = (n + threads - 1) / threads;
  std::vector<std::thread> workers;
  for (int64_t first = begin + each; first < end; first += each)
    workers.emplace_back([&f, first, last = std::min(first + each, end)] { f(first, last); });
  f(begin, begin + each);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace known_threads
