// What the glue (ops_cpu.cpp, run.h) and the CPU kernels agree on: how a problem is cut into tasks, and a table of
// kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace coarse {

// The grid of a field along one axis: where each pixel reads it (Tap in grid.h).
template <class R>
struct Axis {
  int64_t grid = 1;
  bool interpolated = false;  // else one point serves a pixel, and its neighbour, which may be -inf or NaN, is not read
  const int32_t* i0 = nullptr;  // (pixels of the axis)
  const R* lambda = nullptr;

  // The other point that pixel k reads.
  int64_t next(int64_t k) const { return after(i0[k]); }
  int64_t after(int64_t point) const { return point + (interpolated && point < grid - 1 ? 1 : 0); }
};

// Rows [y0, y0 + rows) lie in one grid cell of every field with matrices, and lambda grows evenly in each:
// lambda0 + k * step. At most kMaxRows.
constexpr int kMaxRows = 8;
struct Segment {
  int32_t y0, rows;
};
template <class R>
struct Slope {
  R lambda0 = 0, step = 0;
};

// Segments [begin, end) of rows [y0, y1): one cell row of every field with matrices.
struct Band {
  int32_t y0, y1, begin, end;
};

// What one task goes through, image after image: slices [z0, z1), bands [begin, end), columns [x0, x1).
struct Chunk {
  int64_t z0, z1, x0, x1;
  int32_t begin, end;
};

// A field on its grid, and where the sums over pixels go that are its gradient. A unit of the grid is a row, of a
// volume a slice, of a line (an image of one row) a point. Chunks that run at the same time share the units at their
// seams: what a chunk has for the `head` units that an earlier one reads too goes to `heads`, and is added afterwards
// in the order of the chunks; everything else has one writer.
template <class R>
struct FieldPlan {
  bool volume = false, line = false;  // units are slices, or points
  bool on_pixels =
      true;  // a point for each pixel: nothing is interpolated, and gradients are written where they belong
  Axis<R> z, y, x;
  const Slope<R>* slopes = nullptr;  // of each segment
  int rows = 0;                      // of the grid that a band reads, at most
  R* sum = nullptr;     // (images, planes, points), or (groups, planes, points) of one field for all images
  bool zeroed = false;  // `sum` and `heads` arrive as zeros, and every unit may be added to more than once
  R* heads = nullptr;   // (images or groups, chunks, head_slots, planes, unit)
  int64_t head_slots = 0, unit = 0;
  const int32_t *head_first = nullptr, *head_count = nullptr;  // (chunks)
  const int32_t *x_first = nullptr, *x_count = nullptr;        // (chunks) the points of a row that a chunk works on
  int64_t span = 0;                                            // most of them
};

// One matrix for all pixels of an image (matrices.h): tables for all images, or for each, and the sums that are their
// gradients, of which each task has its own: a slot for each image (where they share the matrix, each group of them)
// and chunk.
template <class R>
struct MatrixPlan {
  const R *q = nullptr, *log_q = nullptr;  // (images, C true, C labels)
  const R* log_a = nullptr;                // (images, C observed, C true), where T is learned
  const R* trace = nullptr;                // (images)
  double* counts = nullptr;                // (images or groups, chunks, slot), zeros on arrival; null: not wanted
  int64_t slot = 0;
};

template <class R>
struct Plan {
  FieldPlan<R> seg, kinds[kMaxKinds];
  MatrixPlan<R> matrices[kMaxKinds];
  const Segment* segments = nullptr;
  const Band* bands = nullptr;
  const Chunk* chunks = nullptr;
  int64_t chunk_count = 0;
  int64_t groups = 1;      // of images, each its own tasks
  int per_row = 1;         // vectors of a row that are worked on together
  int vectors = kMaxRows;  // at most, of a slab: rows * per_row
  int most_segments = 1;   // of a band

  int64_t slices = 1;  // of the tasks: those of a slice run one after the other and share one gradient of T

  int64_t tasks() const { return chunk_count * groups; }
  int64_t slice_of(int64_t task) const { return task * slices / tasks(); }
  int64_t first_task(int64_t slice) const { return (slice * tasks() + slices - 1) / slices; }
};

// The kernels of a kind of drawings, in the order in which they are asked.
enum class Form : int {
  trusted,      // no matrices
  one_matrix,   // one for all pixels of an image
  strided,      // matrices on a grid coarser than the pixels
  two_classes,  // a matrix for each pixel, C = 2
  pixels        // a matrix for each pixel
};

// Whether a field is one matrix for all pixels of an image.
inline bool has_one_matrix(const Field& field, bool on_pixels) { return !on_pixels && field.points() == 1; }

template <class R>
Form form_of(const Problem<R>& problem, const Plan<R>& plan, int kind) {
  if (problem.kinds[kind].field.data == nullptr) return Form::trusted;
  if (has_one_matrix(problem.kinds[kind].field, plan.kinds[kind].on_pixels)) return Form::one_matrix;
  if (!plan.kinds[kind].on_pixels) return Form::strided;
  return problem.classes == 2 ? Form::two_classes : Form::pixels;
}

struct LabelScan {
  double weight;  // sum of the weights of the labelled pixels
  bool bad;       // a label out of range was met:
  int64_t label;  // the first one
};

// One instruction set's kernels: a task of a problem, and the workspace that it wants.
template <class R>
struct KernelSet {
  int64_t (*workspace)(const Problem<R>&, const Plan<R>&);
  void (*run)(const Problem<R>&, const Plan<R>&, int64_t task, void* workspace);
};

// Independent chains of multiply-adds that keep every unit busy: units times latency, 8 to 10 on x86-64, 16 on ARM.
// With their two factors they fit the registers, of which AVX2 has 16.
#if defined(__aarch64__)
constexpr int kFmaChains = 16;
#else
constexpr int kFmaChains = 12;
#endif

struct Kernels {
  const char* isa;
  int simd_bytes;
  KernelSet<float> f32;
  LabelScan (*scan_labels)(const void* labels, LabelType type, int64_t n, int64_t ignore_index, int64_t classes);
  void (*exp_array)(const float* x, float* y, int64_t n);
  void (*log_array)(const float* x, float* y, int64_t n);
  void (*stream_copy)(const float* src, float* dst, int64_t n);
  float (*sum_array)(const float* x, int64_t n);
  void (*fma_chains)(float* x, int64_t rounds);
  void (*convert)(const float* src, void* dst, Storage storage, int64_t n);
};

// float64 exists for checking gradients: one set, for any machine.
extern const KernelSet<double> kKernelsDouble;

// Bytes of a core's second-level cache, on which the size of tiles depends; at most 1 MB, for which they were chosen.
int64_t second_level_cache();

// The best set that this machine runs; COARSE_KERNELS_ISA (baseline, avx2, avx512) lowers it. Chosen once.
const Kernels& kernels();

extern const Kernels kKernelsBaseline;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace coarse
