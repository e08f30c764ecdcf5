// What the glue (ops.cpp) hands to the CPU kernels: raw pointers and sizes, nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coarse {

enum class Storage : int { f32, f64, bf16, f16 };
enum class LabelType : int { u8, i64 };

// One annotation stream on the pixel grid (B, D, H, W); lower ranks have D = 1, or D = H = 1. R is float or double.
// Layouts are contiguous; an absent tensor is null.
template <class R>
struct Stream {
  int64_t batch = 0, depth = 1, height = 1, width = 0;
  int classes = 0;
  const void* seg_logits = nullptr;  // (B, C, D, H, W)
  Storage seg_storage = Storage::f32;
  const void* cm_logits = nullptr;  // (B or 1, C, C, grid), the batch axis with its own stride
  Storage cm_storage = Storage::f32;
  int64_t cm_batch = 0;          // 1: the same field for every image
  int64_t cm_batch_stride = 0;   // elements; 0 for an expanded field
  const void* labels = nullptr;  // (B, D, H, W)
  LabelType label_type = LabelType::u8;
  int64_t ignore_index = 255;
  const R* transition = nullptr;    // (C, C); null: identity
  const R* class_weight = nullptr;  // (C)
  const R* pixel_weight = nullptr;  // (B, D, H, W)
  R trace_weight = 0;
  R gradient_scale = 1;

  // Gradients of gradient_scale * sum w (nll + trace_weight * tr A). On a strided grid, and where one field serves
  // several images, cm_gradient is float/double (cm_gradient_storage says which) and arrives filled with zeros.
  void* seg_gradient = nullptr;  // as seg_logits
  void* cm_gradient = nullptr;   // (cm_batch, C, C, grid)
  Storage cm_gradient_storage = Storage::f32;
  R* nll_map = nullptr;       // (B, D, H, W): w nll
  R* trace_map = nullptr;     // (B, D, H, W): w tr A
  void* posterior = nullptr;  // as seg_logits

  // One row per task, so that the sums do not depend on the number of threads.
  double* sums = nullptr;                 // (tasks, 2): sum w nll, sum w tr A
  double* transition_gradient = nullptr;  // (tasks, C, C), zeros on arrival
  unsigned char* bad_label = nullptr;     // (tasks): set where a label is out of range

  int64_t pixels() const { return depth * height * width; }
};

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
