// The machine's own limits, for a benchmark to hold its figures against: memory traffic, and arithmetic with the
// kernels' vectors, on one or more threads. Each is the best of a few turns: whatever else the machine does makes a
// turn slower, never faster.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernel_set.h"

namespace coarse {

inline void check_count(const char* name, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return;
  throw std::invalid_argument(std::string(name) + ": expected at least 1 and at most " + std::to_string(most) +
                              ", got " + std::to_string(value));
}

inline void check_turns(int repeats, int threads) {
  check_count("repeats", repeats, 1'000'000);
  check_count("threads", threads, 1024);
}

// Floats in parts of whole pages, one for each thread. Nothing is written here: a page belongs to the memory of the
// processor that touches it first, so each thread fills its own part.
class Parts {
 public:
  Parts(int64_t least, int threads) : size_((least + threads - 1) / threads) {
    size_ = (size_ + kPage - 1) / kPage * kPage;
    data_.reset(static_cast<float*>(std::aligned_alloc(sizeof(float) * kPage, sizeof(float) * total(threads))));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  int64_t size() const { return size_; }  // of a part
  size_t total(int threads) const { return static_cast<size_t>(size_) * static_cast<size_t>(threads); }
  float* of(int thread) const { return data_.get() + size_ * thread; }
  void fill(int thread, float value) const { std::fill_n(of(thread), size_, value); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static constexpr int64_t kPage = 1024;  // floats
  int64_t size_;
  std::unique_ptr<float[], Free> data_;
};

// Seconds from the common start of work(thread) on all threads until the last is done, the best of `repeats`, after
// prepare(thread) and a turn that does not count: it pays for clocks and caches. The two must not throw.
template <class Prepare, class Work>
double best_seconds(int repeats, int threads, Prepare prepare, Work work) {
  std::vector<double> stamps;
  stamps.reserve(static_cast<size_t>(repeats) + 2);
  const auto stamp = [&]() noexcept {
    stamps.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count());
  };
  std::barrier together(threads, stamp);  // the last to arrive takes the time
  std::atomic<bool> abandoned{false};
  const auto turns = [&](int thread) {
    prepare(thread);
    together.arrive_and_wait();
    for (int k = 0; k <= repeats && !abandoned; ++k) {
      work(thread);
      together.arrive_and_wait();
    }
  };
  std::vector<std::thread> others;
  const auto join = [&] {
    for (std::thread& other : others) other.join();
  };
  try {
    others.reserve(static_cast<size_t>(threads));
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(turns, thread);
  } catch (...) {  // no more threads to be had: those that wait for the missing ones must not do so for ever
    abandoned = true;
    for (int missing = threads - static_cast<int>(others.size()); missing > 0; --missing) together.arrive_and_drop();
    join();
    throw;
  }
  turns(0);
  join();
  double best = std::numeric_limits<double>::infinity();
  for (size_t k = 1; k + 1 < stamps.size(); ++k) best = std::min(best, stamps[k + 1] - stamps[k]);
  return best;
}

inline int64_t floats_of(int64_t megabytes) {
  check_count("megabytes", megabytes, 1 << 20);
  return megabytes * (1 << 20) / static_cast<int64_t>(sizeof(float));
}

// Bytes read plus bytes written per second by a copy past the caches.
inline double copy_bandwidth(const Kernels& kernels, int64_t megabytes, int repeats, int threads) {
  check_turns(repeats, threads);
  const Parts src(floats_of(megabytes), threads), dst(floats_of(megabytes), threads);
  const auto prepare = [&](int thread) {
    src.fill(thread, 1.0f);
    dst.fill(thread, 1.0f);
  };
  const auto work = [&](int thread) { kernels.stream_copy(src.of(thread), dst.of(thread), src.size()); };
  const double best = best_seconds(repeats, threads, prepare, work);
  return 2.0 * sizeof(float) * static_cast<double>(src.total(threads)) / best;
}

// Bytes read per second by a sum.
inline double read_bandwidth(const Kernels& kernels, int64_t megabytes, int repeats, int threads) {
  check_turns(repeats, threads);
  const Parts src(floats_of(megabytes), threads);
  const auto prepare = [&](int thread) { src.fill(thread, 1.0f); };
  const auto work = [&](int thread) { kernels.sum_array(src.of(thread), src.size()); };
  const double best = best_seconds(repeats, threads, prepare, work);
  return sizeof(float) * static_cast<double>(src.total(threads)) / best;
}

// Exponentials per second of the vector exp, in cache.
inline double exp_throughput(const Kernels& kernels, int repeats, int threads) {
  check_turns(repeats, threads);
  constexpr int64_t kCount = 4096, kRounds = 1024;  // milliseconds: threads take some microseconds to start together
  const Parts x(kCount * threads, threads), y(kCount * threads, threads);
  const auto prepare = [&](int thread) {
    for (int64_t k = 0; k < kCount; ++k) x.of(thread)[k] = -static_cast<float>(k) / 64.0f;
    y.fill(thread, 0.0f);
  };
  const auto work = [&](int thread) {
    for (int64_t round = 0; round < kRounds; ++round) kernels.exp_array(x.of(thread), y.of(thread), kCount);
  };
  return static_cast<double>(kCount * kRounds) * threads / best_seconds(repeats, threads, prepare, work);
}

// Multiply-adds of one float per second, in registers.
inline double fma_throughput(const Kernels& kernels, int repeats, int threads) {
  check_turns(repeats, threads);
  constexpr int64_t kRounds = 1 << 20;
  const int64_t lanes = kernels.simd_bytes / static_cast<int64_t>(sizeof(float));
  const Parts x(kFmaChains * lanes * threads, threads);
  const auto prepare = [&](int thread) { x.fill(thread, 1.0f); };
  const auto work = [&](int thread) { kernels.fma_chains(x.of(thread), kRounds); };
  const double best = best_seconds(repeats, threads, prepare, work);
  return static_cast<double>(kFmaChains * lanes * kRounds) * threads / best;
}

}  // namespace coarse
