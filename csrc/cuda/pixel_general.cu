// CM logits on the pixel grid, the general way: any number of classes, float or double, and the gradient of the
// transition. A block takes 32 pixels at a time, a lane each; its warps share the columns (log_space.h).
#include "launch.h"
#include "log_space.h"

namespace coarse {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

template <class R>
size_t shared_bytes(const Layer<R>& s, bool transition_gradient) {
  const size_t joint = static_cast<size_t>(s.classes) * kWarp, reported = kWarps * kWarps * kWarp;
  return sizeof(R) * (joint + (transition_gradient ? joint + reported : 0));
}

// dT[i, y] -= weight / D * sum_j A[i,j] p[j], pixel by pixel. Each sum over the pixels of a block belongs to one warp,
// which adds the labels that its lanes hold one after the other: the order is fixed.
template <class R, class Seg, class Logit>
__device__ void add_transition_gradient(const Layer<R>& s, const ColumnShare<R>& share, R* reported, int label, R live,
                                        const LogSpaceResult<R>& pixel, const Seg& seg, const Logit& logit) {
  const int classes = s.classes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* const sum = s.transition_gradient + static_cast<int64_t>(blockIdx.x) * classes * classes;
  // p[j] A[i,j] / D = exp((a[i,j] - top[j]) + base[j]): each factor alone may leave the range, and so may
  // the result before it has its weight
  R* const top = share.joint + static_cast<int64_t>(classes) * share.pitch;
  for (int j = share.first; j < classes; j += share.step) {
    const auto column =
        column_terms<R>(classes, [&](int i) { return logit(i, j); }, [](int) { return Reported<R>{R(1), R(0)}; });
    share.joint[j * share.pitch] = (seg(j) - pixel.top - pixel.log_sum) - pixel.log_d + log_v(column.inv_z);
    top[j * share.pitch] = column.top;
  }
  for (int i0 = 0; i0 < classes; i0 += kWarps) {
    for (int k = 0; k < kWarps; ++k) {
      R part = 0;
      if (i0 + k < classes && !(live == R(0))) {
        for (int j = share.first; j < classes; j += share.step)
          part += scaled_exp(live, (logit(i0 + k, j) - top[j * share.pitch]) + share.joint[j * share.pitch]);
      }
      reported[(warp * kWarps + k) * kWarp + lane] = part;
    }
    __syncthreads();
    const int i = i0 + warp;
    if (i < classes) {
      R value = 0;
      for (int w = 0; w < kWarps; ++w) value += reported[(w * kWarps + warp) * kWarp + lane];
      unsigned left = __ballot_sync(kAllLanes, label >= 0);
      while (left != 0) {
        const int y = __shfl_sync(kAllLanes, label, __ffs(left) - 1);
        const double total = warp_sum(label == y ? static_cast<double>(value) : 0.0);
        if (lane == 0) sum[i * classes + y] -= total;
        left &= ~__ballot_sync(kAllLanes, label == y);
      }
    }
    __syncthreads();
  }
}

// Pixels by words of 32: lane l of word w is pixel ((w / vector) * 32 + l) * vector + w % vector of the region, and
// counts if bit l of mask[w] is set, or if there is no mask.
struct Words {
  const uint32_t* mask;
  int vector;
  int64_t per_image;
};

template <class R>
__global__ void __launch_bounds__(kThreads)
    pixel_general(const __grid_constant__ Layer<R> s, const __grid_constant__ cuda::PixelRegion region, Words words) {
  const int classes = s.classes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  R* const shared = reinterpret_cast<R*>(dynamic_shared());
  const ColumnShare<R> share{warp, kWarps, shared + lane, kWarp};
  R* const reported = shared + 2 * classes * kWarp;
  const int64_t span = region.span;
  const R scale = gradient_scale(s);
  Terms terms;

  for (int64_t word = blockIdx.x; word < words.per_image * region.images; word += gridDim.x) {
    const uint32_t mask = words.mask != nullptr ? words.mask[word] : kAllLanes;
    if (mask == 0) continue;
    const int64_t image = word / words.per_image, own = word % words.per_image;
    const int64_t offset = (own / words.vector * kWarp + lane) * words.vector + own % words.vector;
    const bool inside = offset < span && (mask >> lane & 1) != 0;
    const int64_t at = map_at(s, region.image + image, region.begin + offset);
    const int label = inside ? label_at(s, at) : -1;
    const bool labelled = label >= 0;
    const R weight = labelled ? weight_at(s, label, at) : R(0), scaled = weight * scale;
    const int64_t cm_at = image * s.cm_batch_stride + offset;
    const int64_t gradient_at = image * region.gradient_batch_stride + offset;
    const int64_t class_at = image * s.class_image + offset;

    const bool read_seg = labelled || (inside && s.posterior);
    const int64_t seg_at = image * s.seg_image + offset;
    const auto seg = [&](int j) {
      return read_seg ? load_as<R>(s.seg_logits, s.seg_storage, seg_at + j * s.seg_plane) : R(0);
    };
    const auto logit = [&](int i, int j) {
      const int64_t plane = static_cast<int64_t>(i) * classes + j;
      return labelled ? load_as<R>(s.cm_logits, s.cm_storage, cm_at + plane * region.plane) : R(0);
    };
    const auto emit = [&](int i, int j, R gradient) {
      const int64_t plane = static_cast<int64_t>(i) * classes + j;
      if (inside) put(s.cm_gradient, s.cm_gradient_storage, s.add_cm, gradient_at + plane * region.plane, gradient);
    };
    const auto seg_out = [&](int j, R p, R r) {
      if (!inside || s.class_out == nullptr) return;
      const R gradient = scaled == R(0) ? R(0) : scaled * (p - r), out = s.posterior ? (labelled ? r : p) : gradient;
      put(s.class_out, s.class_storage, s.add_class, class_at + j * s.class_plane, out);
    };
    const auto result = log_space(s, share, label, scaled, scaled * s.trace_weight, s.cm_gradient != nullptr, seg,
                                  logit, emit, seg_out);
    if (s.transition_gradient != nullptr) {
      add_transition_gradient(s, share, reported, label, result.possible ? scaled : R(0), result, seg, logit);
    }
    if (warp == 0 && inside) add_pixel(s, at, weight, result.nll, result.trace, terms);
  }
  if (warp == 0) leave_sums(s, blockIdx.x, terms);
}

// Blocks with a C x C slice of doubles each: at most 64 MB of them.
template <class R>
int64_t blocks_at_once(const Layer<R>& s, bool transition_gradient) {
  int64_t blocks = resident_blocks(pixel_general<R>, kThreads, shared_bytes(s, transition_gradient));
  blocks = blocks < cuda::kSumRows ? blocks : cuda::kSumRows;
  if (transition_gradient) {
    const int64_t slice = 8 * static_cast<int64_t>(s.classes) * s.classes, most = (int64_t{64} << 20) / slice;
    blocks = blocks < most ? blocks : most;
  }
  return blocks;
}

}  // namespace

namespace cuda {

Error pixel_grid_f32(const Layer<float>&, const PixelRegion&, void*);
Error pixel_grid_bf16(const Layer<float>&, const PixelRegion&, void*);
Error pixel_grid_f16(const Layer<float>&, const PixelRegion&, void*);

template <class R>
Refusal pixel_fast_refuses(const Layer<R>& s) {
  if (sizeof(R) == sizeof(double)) return Refusal::wide;
  if (s.classes < 2 || s.classes > kMaxFastClasses) return Refusal::classes;
  if (s.transition_gradient != nullptr) return Refusal::learned;
  return Refusal::none;
}

template <class R>
Error pixel_grid(const Layer<R>& s, const PixelRegion& region, void* stream) {
  if constexpr (sizeof(R) == sizeof(float)) {
    const bool same = s.cm_gradient == nullptr || s.cm_gradient_storage == s.cm_storage;
    if (same && pixel_fast_refuses(s) == Refusal::none) {
      switch (s.cm_storage) {
        case Storage::bf16: return pixel_grid_bf16(s, region, stream);
        case Storage::f16: return pixel_grid_f16(s, region, stream);
        default: return pixel_grid_f32(s, region, stream);
      }
    }
  }
  const Words all{nullptr, 1, (region.span + kWarp - 1) / kWarp};
  const int64_t count = all.per_image * region.images, most = blocks_at_once(s, s.transition_gradient != nullptr);
  return launch(pixel_general<R>, count < most ? count : most, kThreads,
                shared_bytes(s, s.transition_gradient != nullptr), stream, s, region, all);
}

// What a fast kernel left: mostly nothing, so the words are looked through by a few blocks.
Error pixel_log_space(const Layer<float>& s, const PixelRegion& region, int vector, int64_t words, void* stream) {
  const Words marked{s.small_mask, vector, words};
  const int64_t count = words * region.images, most = blocks_at_once(s, s.transition_gradient != nullptr);
  return launch(pixel_general<float>, count < most ? count : most, kThreads,
                shared_bytes(s, s.transition_gradient != nullptr), stream, s, region, marked);
}

template <class R>
int64_t transition_slices(const Layer<R>& s) {
  return blocks_at_once(s, true);
}

template Error pixel_grid(const Layer<float>&, const PixelRegion&, void*);
template Error pixel_grid(const Layer<double>&, const PixelRegion&, void*);
template Refusal pixel_fast_refuses(const Layer<float>&);
template Refusal pixel_fast_refuses(const Layer<double>&);
template int64_t transition_slices(const Layer<float>&);
template int64_t transition_slices(const Layer<double>&);

}  // namespace cuda
}  // namespace coarse
