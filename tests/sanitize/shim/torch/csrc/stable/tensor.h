// As much of the LibTorch stable ABI as the CPU operators use, in standard C++: tensors are blocks of the heap, so that
// an access beyond one is seen, and parallel_for starts threads that a sanitizer knows, where PyTorch's OpenMP has
// others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "known_threads.h"

namespace torch::headeronly {
enum class ScalarType { Byte, Long, Half, Float, Double, BFloat16 };
enum class DeviceType { CPU };
}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::ScalarType;

struct Device {
  explicit Device(headeronly::DeviceType) {}
};

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<void> data, std::vector<int64_t> sizes, std::vector<int64_t> strides, ScalarType type)
      : data_(std::move(data)), sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type) {}

  void* data_ptr() const { return data_.get(); }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t axis) const { return sizes_[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides_[static_cast<size_t>(axis)]; }
  ScalarType scalar_type() const { return type_; }
  Device device() const { return Device(headeronly::DeviceType::CPU); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const { return strides_ == dense(sizes_); }

  static std::vector<int64_t> dense(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes[axis], 1);
    return strides;
  }

 private:
  std::shared_ptr<void> data_;
  std::vector<int64_t> sizes_, strides_;
  ScalarType type_ = ScalarType::Float;
};

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, std::nullopt_t, Device) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  const auto bytes = static_cast<size_t>(count * bytes_of(type));
  std::shared_ptr<void> data(std::malloc(std::max<size_t>(bytes, 1)), std::free);
  std::memset(data.get(), 0xff, bytes);  // NaN: what nobody writes is seen
  return {std::move(data), sizes, Tensor::dense(sizes), type};
}

inline Tensor from_blob(void* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, Device,
                        ScalarType type, const std::function<void(void*)>& deleter) {
  return {std::shared_ptr<void>(data, deleter), sizes, strides, type};
}

// Images may lie apart, or all in one place; within an image the driver makes nothing that is not dense.
inline Tensor contiguous(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return t;
  Tensor copy = empty(t.sizes(), t.scalar_type(), std::nullopt, t.device());
  const int64_t image = t.numel() / t.size(0) * bytes_of(t.scalar_type());
  for (int64_t k = 0; k < t.size(0); ++k)
    std::memcpy(static_cast<char*>(copy.data_ptr()) + k * image,
                static_cast<const char*>(t.data_ptr()) + k * t.stride(0) * bytes_of(t.scalar_type()),
                static_cast<size_t>(image));
  return copy;
}

// Of the thread that calls.
inline int& thread_count() {
  thread_local int count = 1;
  return count;
}

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  known_threads::split(begin, end, grain, thread_count(), f);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace torch::stable

#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) torch::stable::fail(__VA_ARGS__)
