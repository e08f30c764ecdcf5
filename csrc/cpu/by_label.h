// A matrix of which each pixel wants the column of its label: T[:, y], q[:, y].
#pragma once

#include "common.h"

namespace coarse {
namespace {

template <class R>
class ByLabel {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  void init(int classes, Arena& arena) {
    classes_ = classes;
    column_ = arena.take<V>(classes);
    // rows where a permutation of two vectors can look a label up
    table_ = classes <= 2 * N ? arena.take<R>(2 * N * classes) : nullptr;
  }

  // (C, labels), with the workspace in place.
  void set(const R* matrix) {
    matrix_ = matrix;
    if (table_ == nullptr) return;
    for (int i = 0; i < classes_; ++i)
      for (int y = 0; y < 2 * N; ++y) table_[i * 2 * N + y] = y < classes_ ? matrix[i * classes_ + y] : R(0);
  }

  // The column of every lane's label; `y`: the label of them all, or -1.
  void look_up(const int32_t* label, int32_t y) {
    const int c = classes_;
    if (y >= 0) {
      for (int j = 0; j < c; ++j) column_[j] = broadcast<V>(matrix_[static_cast<int64_t>(j) * c + y]);
      return;
    }
    if (table_ != nullptr) {
      I index{};
      for (int k = 0; k < N; ++k) index[k] = label[k];
      for (int j = 0; j < c; ++j) {
        const R* const row = table_ + j * 2 * N;
        column_[j] = permute<R>(load(row), load(row + N), index);
      }
      return;
    }
    for (int j = 0; j < c; ++j) {
      const R* const row = matrix_ + static_cast<int64_t>(j) * c;
      for (int k = 0; k < N; ++k) reinterpret_cast<R*>(column_ + j)[k] = row[label[k]];
    }
  }

  V operator[](int j) const { return column_[j]; }
  R at(int64_t j, int64_t y) const { return matrix_[j * classes_ + y]; }

 private:
  int classes_ = 0;
  const R* matrix_ = nullptr;
  R* table_ = nullptr;
  V* column_ = nullptr;
};

}  // namespace
}  // namespace coarse
