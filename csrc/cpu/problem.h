// What the glue (ops.cpp) hands to the CPU kernels beside a Stream: the grid, the units of work, a table of kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../stream.h"

namespace coarse {

// The grid of the CM field along one axis: where each pixel reads it (Tap in coarse_math.h).
template <class R>
struct Axis {
  int64_t grid = 1;
  bool interpolated = false;  // else one point serves a pixel, and its neighbour, which may be -inf or NaN, is not read
  const int32_t* i0 = nullptr;  // (pixels of the axis)
  const R* lambda = nullptr;
};

// Rows [y0, y0 + rows) lie in one grid cell, and lambda grows evenly: lambda0 + k * step. At most kMaxRows.
constexpr int kMaxRows = 8;
template <class R>
struct RowSegment {
  int32_t y0, rows;
  R lambda0, step;
};

// Segments [begin, end) of one cell row: a unit of work. Cell rows of one colour share no grid row.
struct Band {
  int32_t cell, begin, end;
  int32_t copy;  // which copy of the gradient it adds to
};

template <class R>
struct StridedGrid {
  Axis<R> z, y, x;
  const RowSegment<R>* segments = nullptr;
  int64_t copy_stride = 0;  // elements between copies of cm_gradient
};

struct LabelScan {
  double weight;  // sum of the weights of the labelled pixels
  bool bad;       // a label out of range was met:
  int64_t label;  // the first one
};

// One instruction set's kernels.
template <class R>
struct KernelSet {
  // Pixel grid: pixels [begin, end) of image b, or of every image where one field serves all (b ignored).
  int64_t (*pixel_workspace)(const Stream<R>&);
  void (*pixel_grid)(const Stream<R>&, int64_t task, int64_t b, int64_t begin, int64_t end, void* workspace);
  // Strided grid: one band of one slice z, images [b0, b1).
  int64_t (*strided_workspace)(const Stream<R>&, const StridedGrid<R>&);
  void (*strided_grid)(const Stream<R>&, const StridedGrid<R>&, int64_t task, Band band, int64_t z, int64_t b0,
                       int64_t b1, void* workspace);
};

struct Kernels {
  const char* isa;
  int simd_bytes;
  KernelSet<float> f32;
  LabelScan (*scan_labels)(const void* labels, LabelType type, int64_t n, int64_t ignore_index, int64_t classes);
  void (*exp_array)(const float* x, float* y, int64_t n);
  void (*log_array)(const float* x, float* y, int64_t n);
  void (*stream_copy)(const float* src, float* dst, int64_t n);
  void (*convert)(const float* src, void* dst, Storage storage, int64_t n);
};

// float64 exists for checking gradients: one set, for any machine.
extern const KernelSet<double> kKernelsDouble;

// The best set that this machine runs; COARSE_KERNELS_ISA (baseline, avx2, avx512) lowers it. Chosen once.
const Kernels& kernels();

extern const Kernels kKernelsBaseline;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace coarse
