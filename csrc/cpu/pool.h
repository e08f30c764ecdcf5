// Memory of large results and of what is summed up on the way to them. glibc gives a large block back to the system as
// it is freed, so the gradient of every step is made of new pages, and the kernel clears each of them, 4 KB at a time,
// as it is first touched: of a field at every pixel that takes longer than to compute the gradient. So a block comes
// back here when its tensor dies, whoever held it, and waits for the next one of its size; and new blocks ask for huge
// pages, of which there are 512 times fewer.
//
// What waits is bounded, and nothing else is held: a block that does not fit below the limit is unmapped, as glibc
// would do.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "../tensors.h"

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPooledBytes = int64_t{4} << 20;  // from here on; glibc keeps what is smaller, mostly
constexpr int64_t kPoolLimit = int64_t{256} << 20;  // of what waits, at first

class Pool {
 public:
  // Never destroyed: a tensor may outlive everything that is static.
  static Pool& instance() {
    static Pool* const pool = new Pool();
    return *pool;
  }

  // Of at least `bytes`, in whole huge pages; `rounded` says how many.
  void* take(int64_t bytes, int64_t* rounded) {
    *rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // the one that came back last: its pages are the likeliest to be in a cache
      for (size_t k = idle_.size(); k-- > 0;) {
        if (idle_[k].bytes != *rounded) continue;
        void* const data = idle_[k].data;
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(k));
        idle_bytes_ -= *rounded;
        return data;
      }
    }
    void* data = map(*rounded);
    if (data == nullptr) {  // what waits may be what is lacking
      empty();
      data = map(*rounded);
    }
    STD_TORCH_CHECK(data != nullptr, "out of memory: a result of ", bytes, " bytes");
    return data;
  }

  void give_back(void* data, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes > limit_) return unmap(data, bytes);
    try {
      idle_.push_back({data, bytes});
    } catch (const std::bad_alloc&) {  // nothing may leave a tensor's end
      return unmap(data, bytes);
    }
    idle_bytes_ += bytes;
    shrink(limit_);
  }

  int64_t limit() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink(limit_);
  }
  int64_t idle_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
  }
  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  Pool() {
#ifdef __linux__
    // a child that is forked while another thread holds the lock would wait for it for ever
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  // Those that have waited longest go first.
  void shrink(int64_t most) {
    size_t gone = 0;
    for (; idle_bytes_ > most; ++gone) {
      unmap(idle_[gone].data, idle_[gone].bytes);
      idle_bytes_ -= idle_[gone].bytes;
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

#ifdef __linux__
  static void* map(int64_t bytes) {
    const auto size = static_cast<size_t>(bytes), page = static_cast<size_t>(kHugePage);
    void* const all = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    auto* const begin = static_cast<char*>(all);
    char* const data = begin + (page - reinterpret_cast<uintptr_t>(begin) % page) % page;
    if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
    if (char* const end = begin + size + page; end > data + size)
      munmap(data + size, static_cast<size_t>(end - (data + size)));
    madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, pages are small
    return data;
  }
  static void unmap(void* data, int64_t bytes) { munmap(data, static_cast<size_t>(bytes)); }
#else
  static void* map(int64_t bytes) { return std::aligned_alloc(64, static_cast<size_t>(bytes)); }
  static void unmap(void* data, int64_t) { std::free(data); }
#endif

  std::mutex mutex_;
  std::vector<Block> idle_;  // in the order in which they came
  int64_t idle_bytes_ = 0, limit_ = kPoolLimit;
};

// As new_tensor, contiguous, of the pool where it is large.
Tensor output_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
                  : dtype == ScalarType::Float                             ? 4
                  : dtype == ScalarType::Byte                              ? 1
                                                                           : 2;
  for (int64_t n : size) bytes *= n;
  if (bytes < kPooledBytes || Pool::instance().limit() == 0) return new_tensor(like, size, dtype);
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t axis = size.size() - 1; axis > 0; --axis) strides[axis - 1] = strides[axis] * size[axis];
  int64_t rounded = 0;
  void* const data = Pool::instance().take(bytes, &rounded);
  try {
    return torch::stable::from_blob(data, size, strides, like.device(), dtype,
                                    [rounded](void* block) { Pool::instance().give_back(block, rounded); });
  } catch (...) {
    Pool::instance().give_back(data, rounded);
    throw;
  }
}

}  // namespace
