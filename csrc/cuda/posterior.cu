// The posterior of several kinds and layers of drawings: r[j] = p[j] prod q[j], normalised; p where nobody drew, and
// where no class explains what is drawn. In log space, as pixel_general.cu (one layer of one kind with a matrix has the
// fast kernels): a block takes 32 pixels at a time, a lane each, and its warps share the columns.
#include "class_logits.h"
#include "launch.h"

namespace coarse {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// `Drawings`, as far as the kernel needs it: all of them are a kernel's parameter.
template <class R>
struct Evidence {
  const void* field;  // null: A = I
  int64_t image_stride;
  Storage storage;
  int grid[3];
  const void* labels;
  LabelType label_type;
  int layers;
  const R* transition;  // null: T = I
  const R* log_transition;
};

template <class R>
struct AllEvidence {
  Layer<R> image;  // sizes and class logits; the rest is not in use
  int kinds;
  R* joint;  // (blocks, C, kWarp); null: in shared memory
  Evidence<R> of[kMaxKinds];
};

// log q[j] of a label: log sum_i T[i,y] A[i,j].
template <class R>
__device__ R log_explained(const Evidence<R>& kind, int classes, int j, int64_t image, int label,
                           const Corners<R>& corners, int64_t points) {
  const R inf = std::numeric_limits<R>::infinity();
  const auto reported = [&](int i) {
    if (kind.transition == nullptr) return i == label ? Reported<R>{R(1), R(0)} : Reported<R>{R(0), -inf};
    return Reported<R>{kind.transition[i * classes + label], kind.log_transition[i * classes + label]};
  };
  if (kind.field == nullptr) return reported(j).log_t;
  const int64_t first = image * kind.image_stride;
  const auto logit = [&](int i) {
    const int64_t plane = first + (static_cast<int64_t>(i) * classes + j) * points;
    return corners.interpolate([&](int k) { return load_as<R>(kind.field, kind.storage, plane + k); });
  };
  return column_terms<R>(classes, logit, reported).log_q;
}

template <class R>
__global__ void __launch_bounds__(kThreads) posterior_of_all(const __grid_constant__ AllEvidence<R> all) {
  const R inf = std::numeric_limits<R>::infinity();
  const Layer<R>& s = all.image;
  const int classes = s.classes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  R* const own_joint = all.joint + static_cast<int64_t>(blockIdx.x) * classes * kWarp;
  R* const joint = (all.joint != nullptr ? own_joint : reinterpret_cast<R*>(dynamic_shared())) + lane;
  const int64_t pixels = s.pixels(), per_image = (pixels + kWarp - 1) / kWarp;
  const int depth = static_cast<int>(s.depth), height = static_cast<int>(s.height), width = static_cast<int>(s.width);
  for (int64_t word = blockIdx.x; word < per_image * s.batch; word += gridDim.x) {
    const int64_t image = word / per_image, own = word % per_image * kWarp + lane;
    const bool inside = own < pixels;
    const int pixel = inside ? static_cast<int>(own) : 0;
    const ClassLogits<R> seg(s, image, pixel);
    R top = seg(0), sum = 0;
    for (int j = 1; j < classes; ++j) top = max_v(seg(j), top);
    for (int j = 0; j < classes; ++j) sum += exp_v(seg(j) - top);
    for (int j = warp; j < classes; j += kWarps) joint[j * kWarp] = seg(j) - top;

    bool drawn = false;
    for (int k = 0; k < all.kinds; ++k) {
      const Evidence<R>& kind = all.of[k];
      const Corners<R> corners(kind.grid, depth, height, width, pixel);
      const int64_t points = static_cast<int64_t>(kind.grid[0]) * kind.grid[1] * kind.grid[2];
      for (int layer = 0; layer < kind.layers; ++layer) {
        const int64_t at = (image * kind.layers + layer) * pixels + pixel;
        const int label = inside ? valid_label(kind.labels, kind.label_type, at, s.ignore_index, classes) : -1;
        if (label < 0) continue;
        drawn = true;
        for (int j = warp; j < classes; j += kWarps)
          joint[j * kWarp] += log_explained(kind, classes, j, image, label, corners, points);
      }
    }
    __syncthreads();
    R joint_top = -inf, total = 0;
    for (int j = 0; j < classes; ++j) joint_top = max_v(joint[j * kWarp], joint_top);
    const R shift = joint_top == -inf ? R(0) : joint_top;
    for (int j = 0; j < classes; ++j) total += exp_v(joint[j * kWarp] - shift);
    const bool explained = drawn && !(total == R(0));  // NaN counts as possible, so that it is seen
    if (inside) {
      for (int j = warp; j < classes; j += kWarps) {
        const R out = explained ? exp_v(joint[j * kWarp] - shift) / total : exp_v(seg(j) - top) / sum;
        store_as(s.class_out, s.class_storage, image * s.class_image + j * s.class_plane + pixel, out);
      }
    }
    __syncthreads();
  }
}

}  // namespace

namespace cuda {

// Where a block's share does not fit in shared memory (48 KB need no leave on any device).
template <class R>
int64_t posterior_scratch(const Problem<R>& problem) {
  const int64_t each = static_cast<int64_t>(problem.classes) * kWarp;
  if (each * static_cast<int64_t>(sizeof(R)) <= 48 * 1024) return 0;
  return 4 * resident_blocks(coarse::posterior_of_all<R>, kThreads, 0) * each;
}

template <class R>
Error posterior_of_all(const Problem<R>& problem, const R* const* log_transition, R* scratch, void* stream) {
  AllEvidence<R> all{};
  all.image = layer_of(problem, 0, 0);
  all.image.class_out = problem.posterior;
  all.image.class_storage = problem.seg.storage;
  all.image.class_plane = problem.pixels();
  all.image.class_image = problem.classes * problem.pixels();
  all.kinds = problem.kind_count;
  for (int k = 0; k < problem.kind_count; ++k) {
    const Drawings<R>& kind = problem.kinds[k];
    Evidence<R>& of = all.of[k];
    of.field = kind.field.data;
    of.image_stride = kind.field.image_stride;
    of.storage = kind.field.storage;
    for (int axis = 0; axis < 3; ++axis) of.grid[axis] = static_cast<int>(kind.field.grid[axis]);
    of.labels = kind.labels;
    of.label_type = kind.label_type;
    of.layers = static_cast<int>(kind.layers);
    of.transition = kind.transition;
    of.log_transition = log_transition[k];
  }
  all.joint = scratch;
  const size_t bytes = scratch != nullptr ? 0 : sizeof(R) * problem.classes * kWarp;
  const int64_t words = (problem.pixels() + kWarp - 1) / kWarp * problem.batch;
  const int64_t most = 4 * resident_blocks(coarse::posterior_of_all<R>, kThreads, bytes);
  return launch(coarse::posterior_of_all<R>, words < most ? words : most, kThreads, bytes, stream, all);
}

template int64_t posterior_scratch(const Problem<float>&);
template int64_t posterior_scratch(const Problem<double>&);
template Error posterior_of_all(const Problem<float>&, const float* const*, float*, void*);
template Error posterior_of_all(const Problem<double>&, const double* const*, double*, void*);

}  // namespace cuda
}  // namespace coarse
