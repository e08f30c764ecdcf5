// A problem run on a GPU: workspace booked, kernels launched on the current stream. Nothing here waits for the device
// or allocates outside PyTorch's allocator, so a call can be captured in a CUDA graph.
//
// Trusted kinds go first, all in one pass (trusted.cu). Kinds with a matrix follow one after the other, a layer at a
// time, each in the first of these ways that serves it:
//
//   cells    the field on a grid of cells, interpolated in the kernel (strided.cu)
//   pixels   the field on the pixel grid, read and written where it lies (pixel_fast.h, pixel_general.cu)
//   pieces   any grid: expanded, computed and gathered a piece of an image at a time (field.cu)
//
// They share the gradient of the class logits: the first writes it, the others add, in R; it is rounded to storage
// once. A kind's p costs C exponentials a pixel beside the C x C of its matrix, so forming it anew for each kind is
// cheap.
#pragma once

#include <algorithm>

#include "../operators.h"
#include "glue.h"
#include "launch.h"
#include "trusted.h"

namespace {

using coarse::Layer;
using coarse::Trusted;

template <class R>
constexpr Storage kOwnStorage = sizeof(R) == 4 ? Storage::f32 : Storage::f64;

// A piece of an image at pixel resolution, where a field or the class logits are taken piece by piece: two buffers of
// this size at most, however large the image, and two of class logits.
#if !defined(COARSE_PIECE_BYTES)
#define COARSE_PIECE_BYTES (int64_t{32} << 20)
#endif
constexpr int64_t kPieceBytes = COARSE_PIECE_BYTES;

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// A gradient to which several launches add: R until `finish`, which rounds it to its storage.
template <class R>
class Sum {
 public:
  // `alone`: one launch writes all of it, and may do so as it is stored.
  void open(const Tensor& gradient, Storage storage, bool alone) {
    out_ = gradient;
    storage_ = storage;
    if (!alone && storage != kOwnStorage<R>) buffer_ = new_tensor(gradient, {gradient.numel()}, dtype_of<R>());
  }
  bool wanted() const { return out_.has_value(); }
  void* data() const { return buffer_.has_value() ? buffer_->data_ptr() : out_->data_ptr(); }
  Storage storage() const { return buffer_.has_value() ? kOwnStorage<R> : storage_; }
  void zero(void* stream) {
    const Tensor& all = buffer_.has_value() ? *buffer_ : *out_;
    check(cuda::fill_zero(all.data_ptr(), bytes_of(all), stream));
  }
  void finish(void* stream) const {
    if (buffer_.has_value())
      check(cuda::sum_copies(data_of<R>(*buffer_), 1, buffer_->numel(), out_->data_ptr(), storage_, stream));
  }

 private:
  OptionalTensor out_, buffer_;
  Storage storage_ = Storage::f32;
};

template <class R>
class Run {
 public:
  explicit Run(Call<R>& call) : call_(call), problem_(call.problem), device_(call.like()), stream_(device_.stream) {
    STD_TORCH_CHECK(problem_.pixels() < (int64_t{1} << 31), "labels: expected fewer than 2^31 pixels in an image");
    const int64_t size[3] = {problem_.depth, problem_.height, problem_.width};
    for (int axis = 0; axis < 3; ++axis) {
      size_[axis] = size[axis];
      seg_grid_.size[axis] = problem_.seg.grid[axis];
      seg_on_pixels_ = seg_on_pixels_ && seg_grid_.size[axis] == size[axis];
    }
  }

  void objective() {
    const auto count = call_.kinds.size();
    const Tensor rows = zeros(static_cast<int64_t>(count) * 2 * cuda::kSumRows);
    int64_t trusted = 0, matrices = 0;  // layers
    for (const Drawings<R>& kind : call_.kinds) (kind.field.data == nullptr ? trusted : matrices) += kind.layers;
    const bool nothing = problem_.batch == 0 || problem_.pixels() == 0;
    if (call_.seg_gradient.dim() > 1) {
      // on a coarser grid a kind with a matrix adds, tile by tile
      const bool alone = matrices == 0 || (matrices == 1 && trusted == 0 && seg_on_pixels_);
      seg_gradient_.open(call_.seg_gradient, problem_.seg.storage, alone);
      if (nothing || trusted + matrices == 0 || (trusted == 0 && !seg_on_pixels_)) seg_gradient_.zero(stream_);
    }
    run_trusted(data_of<double>(rows), nothing);
    for (size_t k = 0; k < count; ++k) {
      if (call_.kinds[k].field.data != nullptr) run_kind(k, data_of<double>(rows) + k * 2 * cuda::kSumRows, nothing);
    }
    if (seg_gradient_.wanted()) seg_gradient_.finish(stream_);
    if (!call_.per_pixel) finish(data_of<double>(rows));
  }

  void posterior() {
    if (problem_.batch == 0 || problem_.pixels() == 0) return;
    const bool single = problem_.kind_count == 1 && call_.kinds[0].layers == 1 && call_.kinds[0].field.data != nullptr;
    if (single) {
      const Tensor rows = zeros(2 * cuda::kSumRows);
      run_kind(0, data_of<double>(rows), false);
      return;
    }
    std::vector<const R*> logs;
    for (const Drawings<R>& kind : call_.kinds) logs.push_back(log_of(kind.transition));
    const int64_t wanted = cuda::posterior_scratch(problem_);
    check(cuda::posterior_of_all(problem_, logs.data(), wanted > 0 ? scratch(wanted) : nullptr, stream_));
  }

  // Of a kind: its way (0: trusted; 1: cells; 2: pixels; 3: pieces), why not cells, why not pixels, why the general
  // kernel of pixels and not the fast one.
  void kernels(int64_t* out) {
    if (call_.seg_gradient.dim() > 1) seg_gradient_.open(call_.seg_gradient, problem_.seg.storage, true);
    for (size_t k = 0; k < call_.kinds.size(); ++k, out += 4) {
      const Drawings<R>& drawings = call_.kinds[k];
      std::fill_n(out, 4, 0);
      if (drawings.field.data == nullptr) continue;
      const Kind kind = kind_of(k);
      Layer<R> s = layer(kind, 0);
      double learned = 0;
      if (kind.want_transition) s.transition_gradient = &learned;
      cuda::Refusal refusals[3] = {cells_refuse(kind, s), region_refuses(kind), cuda::pixel_fast_refuses(s)};
      out[0] = refusals[0] == cuda::Refusal::none ? 1 : refusals[1] == cuda::Refusal::none ? 2 : 3;
      for (int n = 0; n < 3; ++n) out[n + 1] = static_cast<int64_t>(refusals[n]);
    }
  }

  void label_map() {
    Trusted<R> t = trusted_of();
    t.label_map = problem_.label_map;
    if (problem_.batch > 0 && problem_.pixels() > 0) check(cuda::trusted_labels(t, stream_));
  }

 private:
  // --- workspace -----------------------------------------------------------------------------------------------------

  Tensor keep(const Tensor& t) {
    kept_.push_back(t);
    return t;
  }
  R* scratch(int64_t n) { return data_of<R>(keep(call_.empty({n}))); }
  Tensor zeros(int64_t n) {
    const Tensor t = keep(new_tensor(call_.like(), {n}, ScalarType::Double));
    check(cuda::fill_zero(t.data_ptr(), 8 * n, stream_));
    return t;
  }
  void release() { kept_.clear(); }
  int64_t entries() const { return static_cast<int64_t>(problem_.classes) * problem_.classes; }
  const R* scale_of(size_t k) const {
    return call_.in.scale.empty() || !present(call_.in.scale[k]) ? nullptr : data_of<R>(call_.in.scale[k]);
  }
  const R* log_of(const R* transition) {
    if (transition == nullptr) return nullptr;
    R* const logs = scratch(entries());
    check(cuda::log_values(transition, logs, entries(), stream_));
    return logs;
  }
  void finish(const double* rows) {
    cuda::AllSums<R> sums{};
    sums.kinds = problem_.kind_count;
    sums.loss = data_of<R>(call_.loss);
    for (size_t k = 0; k < call_.kinds.size(); ++k) {
      sums.of[k] = {rows + k * 2 * cuda::kSumRows,
                    scale_of(k),
                    call_.weight[k],
                    call_.trace_weight[k],
                    data_of<R>(call_.losses[k]),
                    data_of<R>(call_.nll[k]),
                    data_of<R>(call_.trace[k])};
    }
    check(cuda::finish(sums, stream_));
  }

  // --- trusted kinds -------------------------------------------------------------------------------------------------

  Trusted<R> trusted_of() const {
    Trusted<R> t;
    t.batch = problem_.batch;
    for (int axis = 0; axis < 3; ++axis) {
      t.size[axis] = static_cast<int>(size_[axis]);
      t.grid[axis] = static_cast<int>(problem_.seg.grid[axis]);
    }
    t.classes = problem_.classes;
    t.storage = problem_.seg.storage;
    t.seg_logits = problem_.seg.data;
    t.ignore_index = problem_.ignore_index;
    return t;
  }

  void run_trusted(double* rows, bool nothing) {
    Trusted<R> t = trusted_of();
    std::vector<size_t> own;  // which of the kinds
    bool learned = false, any_transition = false;
    for (size_t k = 0; k < call_.kinds.size(); ++k) {
      const Drawings<R>& from = call_.kinds[k];
      if (from.field.data != nullptr) continue;
      coarse::TrustedKind<R>& kind = t.kinds[t.kind_count++];
      own.push_back(k);
      kind.labels = from.labels;
      kind.label_type = from.label_type;
      kind.layers = from.layers;
      kind.transition = from.transition;
      kind.class_weight = from.class_weight;
      kind.pixel_weight = from.pixel_weight;
      kind.scale = scale_of(k);
      kind.weight = call_.weight[k];
      kind.nll_map = from.nll_map;
      if (call_.per_pixel) {
        kind.loss_map = data_of<R>(call_.losses[k]);
        check(cuda::fill_zero(from.trace_map, bytes_of(call_.trace[k]), stream_));
      }
      kind.sums = rows + k * 2 * cuda::kSumRows;
      t.layers += kind.layers;
      learned = learned || call_.wants_transition(k);
      any_transition = any_transition || kind.transition != nullptr;
    }
    const bool want_seg = seg_gradient_.wanted() && t.layers > 0, gathers = want_seg && !t.on_pixels();
    if (want_seg) {
      t.gradient = seg_gradient_.data();
      t.gradient_in_r = seg_gradient_.storage() != t.storage;
    }
    // left for the kernels after the first: see trusted.h
    const int64_t all = t.batch * t.pixels();
    if (gathers) {
      t.top = scratch(all);
      t.factor = scratch(all);
    }
    if (gathers || learned || (want_seg && t.layers > cuda::kHeldLayers)) {
      t.share = scratch(all * t.layers);
      if (any_transition) t.layer_top = scratch(all * t.layers);
    }
    if (!nothing && t.layers > 0) {
      check(cuda::trusted_pixels(t, stream_));
      if (gathers) check(cuda::trusted_gather(t, stream_));
      seg_written_ = true;
    }
    for (size_t n = 0; n < own.size(); ++n) {
      const size_t k = own[n];
      if (!call_.wants_transition(k)) continue;
      const int64_t slices = nothing ? 1 : cuda::trusted_slices(t);
      const Tensor partial = zeros(slices * entries());
      if (!nothing && t.layers > 0)
        check(cuda::trusted_transition(t, static_cast<int>(n), slices, data_of<double>(partial), stream_));
      check(cuda::sum_slices(data_of<double>(partial), slices, entries(), data_of<R>(call_.transition_gradient[k]),
                             stream_));
    }
    release();
  }

  // --- a kind with a matrix ------------------------------------------------------------------------------------------

  struct Kind {
    size_t k = 0;
    cuda::Grid grid{};
    bool on_pixels = true;
    bool want_cm = false, want_transition = false;
    const R* log_transition = nullptr;
    int64_t slices = 0;
    double *sums = nullptr, *transition_gradient = nullptr;
  };

  Kind kind_of(size_t k) const {
    const Field& field = call_.kinds[k].field;
    const bool posterior = problem_.posterior != nullptr;
    Kind kind;
    kind.k = k;
    kind.want_cm = !posterior && field.gradient != nullptr;
    kind.want_transition = !posterior && call_.wants_transition(k);
    for (int axis = 0; axis < 3; ++axis) {
      kind.grid.size[axis] = field.grid[axis];
      kind.on_pixels = kind.on_pixels && field.grid[axis] == size_[axis];
    }
    return kind;
  }

  void run_kind(size_t k, double* sums, bool nothing) {
    const Drawings<R>& drawings = call_.kinds[k];
    Kind kind = kind_of(k);
    kind.sums = sums;
    kind.log_transition = log_of(drawings.transition);
    if (kind.want_transition) {
      kind.slices = nothing ? 1 : cuda::transition_slices(layer(kind, 0));
      kind.transition_gradient = data_of<double>(zeros(kind.slices * entries()));
    }
    if (nothing || drawings.layers == 0) {
      if (kind.want_cm) check(cuda::fill_zero(drawings.field.gradient, bytes_of(call_.cm_gradient[k]), stream_));
    } else if (cells_refuse(kind, layer(kind, 0)) == cuda::Refusal::none) {
      run_cells(kind);
    } else {
      run_regions(kind);
    }
    if (kind.want_transition) {
      check(cuda::sum_slices(kind.transition_gradient, kind.slices, entries(), data_of<R>(call_.transition_gradient[k]),
                             stream_));
    }
    release();
  }

  cuda::Refusal cells_refuse(const Kind& kind, const Layer<R>& s) const {
    if constexpr (sizeof(R) == sizeof(double)) {
      return cuda::Refusal::wide;
    } else {
      return cuda::plan_strided(s, kind.grid, kind.want_cm, seg_gradient_.wanted()).refusal;
    }
  }

  // Why the field is not read and written where it lies.
  cuda::Refusal field_refuses(const Kind& kind) const {
    const Drawings<R>& drawings = call_.kinds[kind.k];
    if (!kind.on_pixels) return cuda::Refusal::grid;
    if (kind.want_cm && drawings.field.images == 1 && problem_.batch > 1) return cuda::Refusal::shared;
    // layers add to each other in R
    if (kind.want_cm && drawings.layers > 1 && drawings.field.storage != kOwnStorage<R>) return cuda::Refusal::layers;
    return cuda::Refusal::none;
  }
  // Why an image is taken piece by piece.
  cuda::Refusal region_refuses(const Kind& kind) const {
    const cuda::Refusal field = field_refuses(kind);
    return field == cuda::Refusal::none && !seg_on_pixels_ ? cuda::Refusal::class_grid : field;
  }

  Layer<R> layer(const Kind& kind, int64_t number) {
    Layer<R> s = coarse::layer_of(problem_, static_cast<int>(kind.k), number);
    s.log_transition = kind.log_transition;
    s.sums = kind.sums;
    s.transition_gradient = kind.transition_gradient;
    s.posterior = problem_.posterior != nullptr;
    if (s.posterior) return s;
    s.weight = static_cast<R>(call_.weight[kind.k]);
    s.scale = scale_of(kind.k);
    if (call_.per_pixel) s.loss_map = data_of<R>(call_.losses[kind.k]) + number * problem_.pixels();
    return s;
  }

  // Where what each class and pixel gets lies on the pixel grid.
  void write_classes(Layer<R>& s) {
    s.class_plane = problem_.pixels();
    s.class_image = problem_.classes * problem_.pixels();
    if (s.posterior) {
      s.class_out = problem_.posterior;
      s.class_storage = problem_.seg.storage;
    } else if (seg_gradient_.wanted() && seg_on_pixels_) {
      s.class_out = seg_gradient_.data();
      s.class_storage = seg_gradient_.storage();
      s.add_class = seg_written_;
      seg_written_ = true;
    }
  }
  uint32_t* mask(int64_t words) {
    return static_cast<uint32_t*>(keep(new_tensor(call_.like(), {words}, ScalarType::Int)).data_ptr());
  }

  void run_cells(const Kind& kind) {
    if constexpr (sizeof(R) == sizeof(float)) {
      const bool want_cm = kind.want_cm;
      const cuda::StridedPlan plan = cuda::plan_strided(layer(kind, 0), kind.grid, want_cm, seg_gradient_.wanted());
      const Field& field = call_.kinds[kind.k].field;
      Sum<R> gradient;
      OptionalTensor copies;
      R* cm = nullptr;
      if (want_cm) {
        const Tensor& out = call_.cm_gradient[kind.k];
        if (plan.copies == 1) {
          gradient.open(out, field.storage, false);
          gradient.zero(stream_);
          cm = static_cast<R*>(gradient.data());
        } else {
          copies = call_.empty({plan.copies * out.numel()});
          check(cuda::fill_zero(copies->data_ptr(), bytes_of(*copies), stream_));
          cm = data_of<R>(*copies);
        }
      }
      uint32_t* const marked = mask(plan.mask_words);
      R* const class_tiles = plan.class_floats > 0 ? scratch(plan.class_floats) : nullptr;
      for (int64_t number = 0; number < call_.kinds[kind.k].layers; ++number) {
        Layer<R> s = layer(kind, number);
        write_classes(s);
        s.class_tiles = class_tiles;
        s.cm_gradient = cm;
        s.small_mask = marked;
        R* const class_gradient = class_tiles != nullptr ? static_cast<R*>(seg_gradient_.data()) : nullptr;
        check(cuda::strided_grid(s, kind.grid, class_gradient, stream_));
      }
      if (copies.has_value()) {
        const Tensor& out = call_.cm_gradient[kind.k];
        check(cuda::sum_copies(cm, plan.copies, out.numel(), out.data_ptr(), field.storage, stream_));
      } else if (want_cm) {
        gradient.finish(stream_);
      }
    }
  }

  // Pixels, and pieces. What does not lie on the pixel grid is handed to the kernels as a piece of an image that does.
  void run_regions(const Kind& kind) {
    const bool want_cm = kind.want_cm;
    const Drawings<R>& drawings = call_.kinds[kind.k];
    const Field& field = drawings.field;
    const int64_t pixels = problem_.pixels(), layers = drawings.layers, planes = entries();
    const bool shared = field.images == 1 && problem_.batch > 1;
    const bool in_place = field_refuses(kind) == cuda::Refusal::none;
    const bool gathers_seg = seg_gradient_.wanted() && !seg_on_pixels_;
    if (region_refuses(kind) == cuda::Refusal::none) {
      cuda::PixelRegion region;
      region.images = problem_.batch;
      region.span = region.plane = pixels;
      region.gradient_batch_stride = planes * pixels;
      uint32_t* const marked = mask(cuda::mask_words(problem_.batch, pixels));
      for (int64_t number = 0; number < layers; ++number) {
        Layer<R> s = layer(kind, number);
        write_classes(s);
        s.seg_plane = s.class_plane;
        s.seg_image = s.class_image;
        s.cm_gradient = want_cm ? field.gradient : nullptr;
        s.cm_gradient_storage = field.storage;
        s.add_cm = number > 0;
        s.small_mask = marked;
        check(cuda::pixel_grid(s, region, stream_));
      }
      return;
    }

    const int64_t each = static_cast<int64_t>(sizeof(R)) * (in_place ? problem_.classes : planes);
    const int64_t span = std::min(pixels, std::max<int64_t>(kPieceBytes / each / 32 * 32, 32));
    R* const logits = in_place ? nullptr : scratch(planes * span);
    R* const gradients = want_cm && !in_place ? scratch(planes * span) : nullptr;
    R* const class_logits = seg_on_pixels_ ? nullptr : scratch(problem_.classes * span);
    R* const class_gradients = gathers_seg ? scratch(problem_.classes * span) : nullptr;
    Sum<R> sum;
    if (gradients != nullptr) {
      // on the pixel grid every entry is gathered once
      const bool once = kind.on_pixels && !shared;
      sum.open(call_.cm_gradient[kind.k], field.storage, once);
      if (!once) sum.zero(stream_);
    }
    const bool writes_classes = !gathers_seg && (problem_.posterior != nullptr || seg_gradient_.wanted());
    const bool written_before = seg_written_;
    uint32_t* const marked = mask(cuda::mask_words(1, span));
    for (int64_t image = 0; image < problem_.batch; ++image) {
      const int64_t own = field.images == 1 ? 0 : image;
      const void* const from = at(field.data, field.storage, own * field.image_stride);
      for (int64_t begin = 0; begin < pixels; begin += span) {
        const cuda::Piece piece{{size_[0], size_[1], size_[2]}, begin, std::min(begin + span, pixels)};
        cuda::PixelRegion region;
        region.image = image;
        region.images = 1;
        region.begin = begin;
        region.span = piece.end - begin;
        region.plane = in_place ? pixels : region.span;
        const void* const seg_from =
            at(problem_.seg.data, problem_.seg.storage, image * problem_.classes * seg_grid_.points());
        if (!seg_on_pixels_) {
          check(cuda::expand_field(seg_from, problem_.seg.storage, problem_.classes, seg_grid_, piece, class_logits,
                                   stream_));
        }
        if (!in_place) check(cuda::expand_field(from, field.storage, planes, kind.grid, piece, logits, stream_));
        for (int64_t number = 0; number < layers; ++number) {
          Layer<R> s = layer(kind, number);
          s.cm_batch_stride = 0;
          s.seg_logits = seg_on_pixels_ ? at(seg_from, problem_.seg.storage, begin) : class_logits;
          s.seg_storage = seg_on_pixels_ ? problem_.seg.storage : kOwnStorage<R>;
          s.seg_plane = seg_on_pixels_ ? pixels : region.span;
          if (in_place) {
            s.cm_logits = at(from, field.storage, begin);
            s.cm_gradient = want_cm ? at(field.gradient, field.storage, own * planes * pixels + begin) : nullptr;
            s.cm_gradient_storage = field.storage;
          } else {
            s.cm_logits = logits;
            s.cm_storage = s.cm_gradient_storage = kOwnStorage<R>;
            s.cm_gradient = gradients;
          }
          s.add_cm = number > 0;
          if (gathers_seg) {
            s.class_out = class_gradients;
            s.class_storage = kOwnStorage<R>;
            s.class_plane = region.span;
            s.add_class = number > 0;
          } else if (writes_classes) {
            seg_written_ = written_before || number > 0;
            write_classes(s);
            s.class_out = at(s.class_out, s.class_storage, image * s.class_image + begin);
          }
          s.small_mask = marked;
          check(cuda::pixel_grid(s, region, stream_));
        }
        if (gradients != nullptr) {
          void* const to = at(sum.data(), sum.storage(), own * planes * kind.grid.points());
          check(cuda::gather_field(gradients, planes, kind.grid, piece, to, sum.storage(), !(kind.on_pixels && !shared),
                                   stream_));
        }
        if (gathers_seg) {
          void* const to = at(seg_gradient_.data(), kOwnStorage<R>, image * problem_.classes * seg_grid_.points());
          check(cuda::gather_field(class_gradients, problem_.classes, seg_grid_, piece, to, kOwnStorage<R>, true,
                                   stream_));
        }
      }
    }
    if (gradients != nullptr) sum.finish(stream_);
  }

  static void* at(const void* p, Storage storage, int64_t elements) {
    return const_cast<char*>(static_cast<const char*>(p)) + elements * coarse::bytes_of(storage);
  }

  Call<R>& call_;
  Problem<R>& problem_;
  OnDevice device_;
  void* stream_;
  int64_t size_[3] = {1, 1, 1};
  cuda::Grid seg_grid_{};
  bool seg_on_pixels_ = true;
  Sum<R> seg_gradient_;
  bool seg_written_ = false;  // what comes adds to what is there
  // Workspace of the launches since the last `release`. PyTorch's allocator hands out again what is freed in the order
  // of the stream, so nobody waits for them.
  std::vector<Tensor> kept_;
};

}  // namespace
