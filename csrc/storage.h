// What tensors are stored as.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coarse {

enum class Storage : int { f32, f64, bf16, f16 };
enum class LabelType : int { u8, i64 };

inline int64_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

}  // namespace coarse
