// The operators on CUDA tensors: tensors in, kernels launched on the current stream, tensors out. Nothing here waits
// for the device or allocates outside PyTorch's allocator, so a call can be captured in a CUDA graph.
//
// The emulator's tests build this very file for CPU tensors (COARSE_EMULATED), in a namespace of operators of its own.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "describe.h"
#include "glue.h"
#include "launch.h"

namespace {

template <class R>
constexpr Storage kOwnStorage = sizeof(R) == 4 ? Storage::f32 : Storage::f64;

// Pixel-resolution logits and gradients of one piece of an image, where a field is taken piece by piece: two buffers of
// this size at most, however large the image.
#if !defined(COARSE_PIECE_BYTES)
#define COARSE_PIECE_BYTES (int64_t{32} << 20)
#endif
constexpr int64_t kPieceBytes = COARSE_PIECE_BYTES;

template <class R>
class Call {
 public:
  Call(Inputs inputs, int64_t ignore_index, double trace_weight)
      : in_(std::move(inputs)), device_(in_.labels), s_(describe<R>(in_, ignore_index)) {
    s_.trace_weight = static_cast<R>(trace_weight);
    const std::array<int64_t, 3> grid = grid_of(in_.cm_logits, 3);
    const std::array<int64_t, 3> size{s_.depth, s_.height, s_.width};
    for (int axis = 0; axis < 3; ++axis) {
      STD_TORCH_CHECK(grid[axis] <= size[axis] && (grid[axis] > 0 || size[axis] == 0),
                      "cm_logits: its grid does not fit");
      grid_.size[axis] = grid[axis];
    }
    on_pixels_ = grid == size;
    STD_TORCH_CHECK(s_.pixels() < (int64_t{1} << 31), "labels: expected fewer than 2^31 pixels in an image");
    if (s_.transition != nullptr) {
      log_transition_ = empty({entries()});
      check(cuda::log_values(s_.transition, data<R>(*log_transition_), entries(), device_.stream));
      s_.log_transition = data<R>(*log_transition_);
    }
    sums_ = zeros<double>(2 * cuda::kSumRows);
    s_.sums = data<double>(*sums_);
  }

  coarse::Stream<R>& stream() { return s_; }
  const Inputs& inputs() const { return in_; }
  void* cuda_stream() const { return device_.stream; }

  Tensor empty(std::vector<int64_t> size) { return new_tensor(in_.labels, std::move(size), dtype_of<R>()); }

  Tensor want_seg_gradient() {
    Tensor gradient = new_tensor(in_.seg_logits, sizes_of(in_.seg_logits), in_.seg_logits.scalar_type());
    s_.seg_gradient = gradient.data_ptr();
    return gradient;
  }
  Tensor want_cm_gradient() {
    cm_gradient_ = new_tensor(in_.cm_logits, sizes_of(in_.cm_logits), in_.cm_logits.scalar_type());
    return *cm_gradient_;
  }
  void want_transition_gradient() {
    slices_ = cuda::transition_slices(s_);
    transition_ = zeros<double>(slices_ * entries());
    s_.transition_gradient = data<double>(*transition_);
  }

  void run() {
    const bool nothing = s_.batch == 0 || s_.pixels() == 0;
    const bool shared = cm_gradient_.has_value() && s_.cm_batch == 1 && s_.batch > 1;
    if (nothing) {
      if (cm_gradient_.has_value())
        check(cuda::fill_zero(cm_gradient_->data_ptr(), bytes_of(*cm_gradient_), device_.stream));
    } else if (on_pixels_ && !shared) {
      run_pixels();
    } else if (!run_cells()) {
      run_pieces();
    }
  }

  // The gradient of the transition, after `run`.
  Tensor transition_gradient() {
    Tensor gradient = empty({s_.classes, s_.classes});
    check(cuda::finish_transition(s_, slices_, data<R>(gradient), device_.stream));
    return gradient;
  }

 private:
  template <class X>
  static X* data(const Tensor& t) {
    return static_cast<X*>(t.data_ptr());
  }
  template <class X>
  Tensor zeros(int64_t n) {
    Tensor t = new_tensor(in_.labels, {n}, dtype_of<X>());
    check(cuda::fill_zero(t.data_ptr(), n * static_cast<int64_t>(sizeof(X)), device_.stream));
    return t;
  }
  static int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }
  int64_t entries() const { return static_cast<int64_t>(s_.classes) * s_.classes; }
  void take_mask(int64_t words) {
    mask_ = new_tensor(in_.labels, {words}, ScalarType::Int);
    s_.small_mask = data<uint32_t>(*mask_);
  }

  void run_pixels() {
    cuda::PixelRegion region;
    region.images = s_.batch;
    region.span = region.image_pixels = region.plane = s_.pixels();
    region.gradient_batch_stride = entries() * s_.pixels();
    if (cm_gradient_.has_value()) s_.cm_gradient = cm_gradient_->data_ptr();
    s_.cm_gradient_storage = s_.cm_storage;
    take_mask(cuda::mask_words(s_.batch, s_.pixels()));
    check(cuda::pixel_grid(s_, region, device_.stream));
  }

  // The fused way for a grid of cells, where it serves.
  bool run_cells() {
    if constexpr (sizeof(R) == 4) {
      const cuda::StridedPlan plan = cuda::plan_strided(s_, grid_, cm_gradient_.has_value());
      if (!plan.fits) return false;
      const int64_t n = cm_gradient_.has_value() ? cm_gradient_->numel() : 0;
      const bool direct = plan.copies == 1 && s_.cm_storage == Storage::f32;
      OptionalTensor copies;
      if (cm_gradient_.has_value()) {
        if (direct) {
          check(cuda::fill_zero(cm_gradient_->data_ptr(), bytes_of(*cm_gradient_), device_.stream));
        } else {
          copies = zeros<R>(plan.copies * n);
        }
        s_.cm_gradient = direct ? cm_gradient_->data_ptr() : copies->data_ptr();
      }
      s_.cm_gradient_storage = Storage::f32;
      take_mask(plan.mask_words);
      check(cuda::strided_grid(s_, grid_, device_.stream));
      if (copies.has_value()) {
        check(cuda::sum_copies(data<R>(*copies), plan.copies, n, cm_gradient_->data_ptr(), s_.cm_storage,
                               device_.stream));
      }
      return true;
    }
    return false;
  }

  // Any grid: expanded, computed and gathered a piece of an image at a time.
  void run_pieces() {
    const int64_t fit = kPieceBytes / (entries() * static_cast<int64_t>(sizeof(R))) / 32 * 32;
    const int64_t span = std::min(s_.pixels(), std::max<int64_t>(fit, 32));
    const bool want_cm = cm_gradient_.has_value();
    const Tensor logits = empty({entries() * span});
    OptionalTensor gradients, sum;
    const int64_t field = entries() * grid_.points();
    R* total = nullptr;
    if (want_cm) {
      gradients = empty({entries() * span});
      if (s_.cm_storage == kOwnStorage<R>) {
        check(cuda::fill_zero(cm_gradient_->data_ptr(), bytes_of(*cm_gradient_), device_.stream));
        total = data<R>(*cm_gradient_);
      } else {
        sum = zeros<R>(cm_gradient_->numel());
        total = data<R>(*sum);
      }
    }
    take_mask(cuda::mask_words(1, span));
    const int64_t element = s_.cm_storage == Storage::f64 ? 8 : s_.cm_storage == Storage::f32 ? 4 : 2;
    for (int64_t image = 0; image < s_.batch; ++image) {
      coarse::Stream<R> source = s_;
      const int64_t own = s_.cm_batch == 1 ? 0 : image;
      source.cm_logits = static_cast<const char*>(s_.cm_logits) + own * s_.cm_batch_stride * element;
      for (int64_t begin = 0; begin < s_.pixels(); begin += span) {
        const cuda::Piece piece{begin, std::min(begin + span, s_.pixels())};
        cuda::PixelRegion region;
        region.images = 1;
        region.span = region.plane = piece.end - piece.begin;
        region.image_pixels = s_.pixels();
        check(cuda::expand_field(source, grid_, piece, data<R>(logits), device_.stream));
        coarse::Stream<R> part = cuda::part_of(s_, image, begin);
        part.cm_logits = logits.data_ptr();
        part.cm_storage = part.cm_gradient_storage = kOwnStorage<R>;
        part.cm_batch_stride = 0;
        part.cm_gradient = want_cm ? gradients->data_ptr() : nullptr;
        check(cuda::pixel_grid(part, region, device_.stream));
        if (!want_cm) continue;
        check(cuda::gather_field(source, grid_, piece, static_cast<const R*>(gradients->data_ptr()),
                                 total + own * field, device_.stream));
      }
    }
    if (sum.has_value())
      check(cuda::sum_copies(data<R>(*sum), 1, sum->numel(), cm_gradient_->data_ptr(), s_.cm_storage, device_.stream));
  }

  Inputs in_;
  OnDevice device_;
  coarse::Stream<R> s_;
  cuda::Grid grid_{};
  bool on_pixels_ = true;
  int64_t slices_ = 0;
  OptionalTensor cm_gradient_, log_transition_, sums_, transition_, mask_;
};

// --- operators -------------------------------------------------------------------------------------------------------

using NllOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
NllOutput nll(Inputs inputs, OptionalTensor scale, double loss_scale, double trace_weight, int64_t ignore_index,
              bool per_pixel, int64_t wanted) {
  Call<R> call(std::move(inputs), ignore_index, trace_weight);
  coarse::Stream<R>& s = call.stream();
  s.gradient_scale = static_cast<R>(loss_scale);
  s.scale = constant<R>(scale, 1, "scale");

  const std::vector<int64_t> shape = per_pixel ? sizes_of(call.inputs().labels) : std::vector<int64_t>{};
  Tensor loss = call.empty(shape), nll = call.empty(shape), trace = call.empty(shape);
  R* const loss_data = static_cast<R*>(loss.data_ptr());
  R* const nll_data = static_cast<R*>(nll.data_ptr());
  R* const trace_data = static_cast<R*>(trace.data_ptr());
  if (per_pixel) {
    STD_TORCH_CHECK(!scale.has_value() && loss_scale == 1.0, "scale: a map of pixels has none");
    s.loss_map = loss_data;
    s.nll_map = nll_data;
    s.trace_map = trace_data;
  }
  Tensor seg_gradient = wanted & kSeg ? call.want_seg_gradient() : call.empty({0});
  Tensor cm_gradient = wanted & kCm ? call.want_cm_gradient() : call.empty({0});
  if (wanted & kTransition) call.want_transition_gradient();
  call.run();
  Tensor transition_gradient = wanted & kTransition ? call.transition_gradient() : call.empty({0});
  if (!per_pixel) check(cuda::finish(s, loss_data, nll_data, trace_data, call.cuda_stream()));
  return {loss, nll, trace, seg_gradient, cm_gradient, transition_gradient};
}

NllOutput annotation_nll(Tensor seg_logits, Tensor cm_logits, Tensor labels, OptionalTensor transition,
                         OptionalTensor class_weight, OptionalTensor pixel_weight, OptionalTensor scale,
                         double loss_scale, double trace_weight, int64_t ignore_index, bool per_pixel, int64_t wanted) {
  const bool wide = cm_logits.scalar_type() == ScalarType::Double;
  Inputs inputs{seg_logits, cm_logits, labels, transition, class_weight, pixel_weight};
  return wide ? nll<double>(std::move(inputs), scale, loss_scale, trace_weight, ignore_index, per_pixel, wanted)
              : nll<float>(std::move(inputs), scale, loss_scale, trace_weight, ignore_index, per_pixel, wanted);
}

template <class R>
Tensor posterior(Inputs inputs, int64_t ignore_index) {
  Call<R> call(std::move(inputs), ignore_index, 0.0);
  const Tensor& like = call.inputs().seg_logits;
  Tensor result = new_tensor(like, sizes_of(like), like.scalar_type());
  call.stream().posterior = result.data_ptr();
  call.run();
  return result;
}

Tensor annotation_posterior(Tensor seg_logits, Tensor cm_logits, Tensor labels, OptionalTensor transition,
                            int64_t ignore_index) {
  const bool wide = cm_logits.scalar_type() == ScalarType::Double;
  Inputs inputs{seg_logits, cm_logits, labels, transition, std::nullopt, std::nullopt};
  return wide ? posterior<double>(std::move(inputs), ignore_index) : posterior<float>(std::move(inputs), ignore_index);
}

template <class R>
Tensor weigh(Tensor labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t num_classes,
             int64_t ignore_index) {
  labels = torch::stable::contiguous(labels);
  const OnDevice device(labels);
  coarse::Stream<R> s;
  s.classes = static_cast<int>(num_classes);
  s.labels = labels.data_ptr();
  s.label_type = label_type_of(labels);
  s.ignore_index = ignore_index;
  s.class_weight = constant<R>(class_weight, num_classes, "class_weight");
  s.pixel_weight = constant<R>(pixel_weight, labels.numel(), "pixel_weight");
  const Tensor partial = new_tensor(labels, {cuda::kWeightRows}, ScalarType::Double);
  Tensor sum = new_tensor(labels, {}, ScalarType::Double);
  check(cuda::label_weight(s, labels.numel(), static_cast<double*>(partial.data_ptr()),
                           static_cast<double*>(sum.data_ptr()), device.stream));
  return sum;
}

// 0-d float64: the sum of class_weight[label] * pixel_weight over labelled pixels.
Tensor labelled_weight(Tensor labels, OptionalTensor class_weight, OptionalTensor pixel_weight, int64_t num_classes,
                       int64_t ignore_index) {
  const Tensor* any = class_weight.has_value() ? &*class_weight : pixel_weight.has_value() ? &*pixel_weight : nullptr;
  const bool wide = any != nullptr && any->scalar_type() == ScalarType::Double;
  return wide ? weigh<double>(labels, class_weight, pixel_weight, num_classes, ignore_index)
              : weigh<float>(labels, class_weight, pixel_weight, num_classes, ignore_index);
}

// gradient *= factor, a 0-d tensor on the same device whose value the host does not learn; where it is 1, as it mostly
// is, no memory moves.
void scale_(Tensor gradient, Tensor factor) {
  STD_TORCH_CHECK(gradient.is_contiguous() && factor.numel() == 1, "scale_: a contiguous gradient and one factor");
  const OnDevice device(gradient);
  const Storage storage = storage_of(gradient, "gradient");
  if (storage == Storage::f64) {
    OptionalTensor own = factor;
    check(
        cuda::scale(gradient.data_ptr(), storage, gradient.numel(), constant<double>(own, 1, "factor"), device.stream));
  } else {
    OptionalTensor own = factor;
    check(
        cuda::scale(gradient.data_ptr(), storage, gradient.numel(), constant<float>(own, 1, "factor"), device.stream));
  }
}

}  // namespace

COARSE_OPERATORS {
  m.impl("annotation_nll", TORCH_BOX(&annotation_nll));
  m.impl("annotation_posterior", TORCH_BOX(&annotation_posterior));
  m.impl("labelled_weight", TORCH_BOX(&labelled_weight));
  m.impl("scale_", TORCH_BOX(&scale_));
}

// Importing the module registers the operators.
#if !defined(COARSE_EMULATED)
#include <Python.h>

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
