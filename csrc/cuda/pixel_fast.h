// CM logits on the pixel grid, the fast way: 2 to 21 classes in float, bfloat16 or float16. Every logit is read once and
// every gradient written once.
//
// A warp is one column j of 32 neighbouring pixels (or 32 runs of kVector pixels): a thread holds its column's C logits,
// then their exponentials, in registers. The C warps of a group meet twice, through shared memory: for the softmax over
// the class logits, and for D = sum_j p[j] q[j]. The gradient is formed from the registers and streamed out.
//
// The limit is memory: (2 C C + 2 C) elements and a label a pixel, 2969 bytes in float at C = 19. Against it stand C C
// exponentials (361: 23 cycles of a multiprocessor's 16 special-function lanes a pixel, where memory gives it about 150)
// and 2 C + C words of shared memory read per thread. What keeps memory busy is requests in flight: a thread issues its C
// loads at once, 46 KB a block at C = 19, and two blocks fit a multiprocessor at 48 registers, so that one loads while
// the other computes. Blocks loop over tiles.
#pragma once

#include "device.h"
#include "launch.h"

namespace coarse {
namespace cuda {
Error pixel_log_space(const Stream<float>& s, const PixelRegion& region, int vector, int64_t words, void* stream);
}
namespace {

// Groups of 32 runs in a block, so that few classes make a block of some size.
template <int C>
constexpr int kGroups = C <= 4 ? 8 / C : 1;

// Pixels of a thread: enough loads in flight where there are few classes, one where registers are dear.
template <int C, Storage kStorage>
constexpr int kWidestVector = kStorage == Storage::f32 ? (C <= 4 ? 4 : C <= 7 ? 2 : 1) : (C <= 7 ? 4 : C <= 10 ? 2 : 1);

template <int C>
constexpr int kFastThreads = kGroups<C>* C* kWarp;

// Blocks of a multiprocessor that the compiler is to leave registers for: 38 warps of 48 registers at C = 19.
template <int C, int kVector>
constexpr int kFastBlocks = kVector > 1 ? 1 : C >= 11 ? (C <= 20 ? 2 : 1) : 512 / kFastThreads<C>;

template <int C>
constexpr int kRow = C | 1;  // of T in shared memory: odd, so that different labels are in different banks

template <int C, int kVector>
struct FastShared {
  float seg[kGroups<C>][C][kWarp * kVector];       // class logits
  float p[kGroups<C>][C][kWarp * kVector];         // exp(s[j] - top)
  float pq[kGroups<C>][C][kWarp * kVector];        // times q[j]
  float diagonal[kGroups<C>][C][kWarp * kVector];  // A[j,j]
  float transition[C * kRow<C>];                   // T[i,y] at [y][i]
  Terms terms[kGroups<C>][kWarp];                  // of the warps with j = 0: registers are dear
};

// kVector elements in one instruction.
template <int kBytes>
struct Chunk;
template <>
struct Chunk<2> {
  using Type = uint16_t;
};
template <>
struct Chunk<4> {
  using Type = uint32_t;
};
template <>
struct Chunk<8> {
  using Type = uint2;
};
template <>
struct Chunk<16> {
  using Type = uint4;
};

template <Storage kStorage, int kVector>
__device__ __forceinline__ void load_vector(const void* p, int64_t at, float* to) {
  using T = typename StorageOf<kStorage>::Type;
  using Word = typename Chunk<kVector * sizeof(T)>::Type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(static_cast<const T*>(p) + at));
  T x[kVector];
  memcpy(x, &word, sizeof(word));
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = decode<kStorage, float>(x[v]);
}

template <Storage kStorage, int kVector>
__device__ __forceinline__ void store_vector(void* p, int64_t at, const float* from) {
  using T = typename StorageOf<kStorage>::Type;
  using Word = typename Chunk<kVector * sizeof(T)>::Type;
  T x[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) x[v] = encode<kStorage>(from[v]);
  Word word;
  memcpy(&word, x, sizeof(word));
  __stcs(reinterpret_cast<Word*>(static_cast<T*>(p) + at), word);
}

// True for all threads that share a group if it is for any of them. The warps of a group see the same pixels, so where
// a block is one group a warp can answer for all; else this is a barrier.
template <int C>
__device__ __forceinline__ bool any_of_block(bool predicate) {
  if constexpr (kGroups<C> == 1) return __any_sync(kAllLanes, predicate);
  return __syncthreads_or(predicate);
}

// Where a thread of a tile works: two numbers, from which addresses are made where they are needed.
template <int C, int kVector>
struct Place {
  int image, offset;  // of the region, and of the pixel in it
  bool inside;        // a run is inside as a whole: kVector > 1 only where it divides the span

  __device__ __forceinline__ Place(const cuda::PixelRegion& region, unsigned tile) {
    constexpr unsigned kTile = kGroups<C> * kWarp * kVector;
    const unsigned span = static_cast<unsigned>(region.span), tiles = (span + kTile - 1) / kTile;
    image = static_cast<int>(tile / tiles);
    offset = static_cast<int>(tile % tiles * kTile + (threadIdx.x / kWarp / C * kWarp + threadIdx.x % kWarp) * kVector);
    inside = static_cast<unsigned>(offset) < span;
  }
  __device__ __forceinline__ int64_t pixel(const cuda::PixelRegion& region) const {
    return image * region.image_pixels + offset;
  }
  __device__ __forceinline__ int64_t seg(const cuda::PixelRegion& region, int j) const {
    return (image * C + j) * region.image_pixels + offset;
  }
  // a[0, j], and its gradient
  __device__ __forceinline__ int64_t cm(const Stream<float>& s, const cuda::PixelRegion& region, int j) const {
    return image * s.cm_batch_stride + j * region.plane + offset;
  }
  __device__ __forceinline__ int64_t gradient(const cuda::PixelRegion& region, int j) const {
    return image * region.gradient_batch_stride + j * region.plane + offset;
  }
};

// Which of a warp's pixels v are left to log space.
template <int kVector>
__device__ __forceinline__ void mark(const Stream<float>& s, unsigned warp_of_pixels, int v, bool small) {
  const unsigned mask = __ballot_sync(kAllLanes, small);
  if (threadIdx.x % kWarp == 0) s.small_mask[static_cast<int64_t>(warp_of_pixels) * kVector + v] = mask;
}

template <int C, Storage kStorage, int kVector, bool kOneHot>
__global__ void __launch_bounds__(kFastThreads<C>, kFastBlocks<C, kVector>)
    pixel_fast(const __grid_constant__ Stream<float> s, const __grid_constant__ cuda::PixelRegion region, unsigned tiles) {
  auto& shared = *reinterpret_cast<FastShared<C, kVector>*>(dynamic_shared());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int j = warp % C, group = warp / C, slot = lane * kVector;
  if constexpr (!kOneHot) {
    for (int k = threadIdx.x; k < C * C; k += kFastThreads<C>)
      shared.transition[k % C * kRow<C> + k / C] = s.transition[k];
  }
  __syncthreads();
  if (j == 0) shared.terms[group][lane] = Terms{};
  const float scale = gradient_scale(s);
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place<C, kVector> place(region, tile);
    const bool inside = place.inside;
    int label[kVector];
    bool any_labelled = false, all_labelled = true;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      label[v] = inside ? label_at(s, place.pixel(region) + v) : -1;
      any_labelled |= label[v] >= 0;
      all_labelled &= label[v] >= 0;
    }

    // A tile that nobody drew on: zeros, and nothing read.
    if (!any_of_block<C>(any_labelled) && s.posterior == nullptr) {
      if (j == 0) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) mark<kVector>(s, tile * kGroups<C> + group, v, false);
      }
      if (!inside) continue;
      const float zeros[kVector] = {};
      if (s.cm_gradient != nullptr) {
        int64_t to = place.gradient(region, j);
#pragma unroll
        for (int i = 0; i < C; ++i, to += C * region.plane) store_vector<kStorage, kVector>(s.cm_gradient, to, zeros);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (s.seg_gradient != nullptr) store_as(s.seg_gradient, s.seg_storage, place.seg(region, j) + v, 0.0f);
        if (j == 0 && s.nll_map != nullptr) write_maps(s, place.pixel(region) + v, 0.0f, 0.0f);
      }
      continue;
    }

    // Logits of pixels without a label may be anything, and count as 0.
    float e[C][kVector];
    int64_t from = place.cm(s, region, j);
#pragma unroll
    for (int i = 0; i < C; ++i, from += C * region.plane) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) e[i][v] = 0.0f;
      if (any_labelled) load_vector<kStorage, kVector>(s.cm_logits, from, e[i]);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const bool read = label[v] >= 0 || (inside && s.posterior != nullptr);
      shared.seg[group][j][slot + v] =
          read ? load_as<float>(s.seg_logits, s.seg_storage, place.seg(region, j) + v) : 0.0f;
    }
    if constexpr (kVector > 1) {
      if (!all_labelled) {
#pragma unroll
        for (int i = 0; i < C; ++i) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) e[i][v] = label[v] >= 0 ? e[i][v] : 0.0f;
        }
      }
    }

    float inv_z[kVector], q[kVector], ajj[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float top = e[0][v];
#pragma unroll
      for (int i = 1; i < C; ++i) top = fmaxf(e[i][v], top);
      [[maybe_unused]] const float* const reported = shared.transition + (label[v] < 0 ? 0 : label[v]) * kRow<C>;
      float z = 0.0f, own = 0.0f;
      q[v] = 0.0f;
#pragma unroll
      for (int i = 0; i < C; ++i) {
        e[i][v] = exp_f32(e[i][v] - top);
        z += e[i][v];
        if constexpr (kOneHot) {
          q[v] = i == label[v] ? e[i][v] : q[v];
        } else {
          q[v] += reported[i] * e[i][v];
        }
        if (i == j) own = e[i][v];
      }
      inv_z[v] = inverse(z);
      q[v] *= inv_z[v];
      ajj[v] = own * inv_z[v];
    }

    // What a thread needs again it reads back from shared memory afterwards: registers are dearer.
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float top = shared.seg[group][0][slot + v];
#pragma unroll
      for (int k = 1; k < C; ++k) top = fmaxf(shared.seg[group][k][slot + v], top);
      const float p = exp_f32(shared.seg[group][j][slot + v] - top);
      shared.p[group][j][slot + v] = p;
      shared.pq[group][j][slot + v] = p * q[v];
      shared.diagonal[group][j][slot + v] = ajj[v];
    }
    __syncthreads();
    // Which pixels are too small for this is the same in all warps of the group: they sum the same numbers.
    unsigned small = 0;
    float evidence[kVector];
    ColumnGradient<float> g[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float sum = 0.0f, d = 0.0f;
#pragma unroll
      for (int k = 0; k < C; ++k) {
        sum += shared.p[group][k][slot + v];
        d += shared.pq[group][k][slot + v];
      }
      const float inv_sum = inverse(sum);
      d *= inv_sum;
      evidence[v] = d;
      const bool labelled = label[v] >= 0, fast = !labelled || d >= kSmallestEvidence<float>;
      small |= static_cast<unsigned>(!fast) << v;
      const float weight = labelled ? weight_at(s, label[v], place.pixel(region) + v) : 0.0f, scaled = weight * scale;
      const float inv_d = fast && labelled ? inverse(d) : 0.0f, p = shared.p[group][j][slot + v] * inv_sum;
      const float r = shared.pq[group][j][slot + v] * inv_sum * inv_d;
      if (inside && fast) {
        const int64_t at = place.seg(region, j) + v;
        if (s.seg_gradient != nullptr) store_as(s.seg_gradient, s.seg_storage, at, scaled * (p - r));
        if (s.posterior != nullptr) store_as(s.posterior, s.seg_storage, at, labelled ? r : p);
      }
      g[v] = column_gradient(p, r, inv_d, inv_z[v], shared.diagonal[group][j][slot + v], scaled,
                             scaled * s.trace_weight);
    }
    if (s.cm_gradient != nullptr && inside) {  // of what is too small, until the next launch
      int64_t to = place.gradient(region, j);
      const int diagonal = again(j);
#pragma unroll
      for (int v = 0; v < kVector; ++v) label[v] = again(label[v]);
#pragma unroll
      for (int i = 0; i < C; ++i, to += C * region.plane) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          float factor;
          if constexpr (kOneHot) {
            factor = i == label[v] ? g[v].keep - g[v].drop : g[v].keep;
          } else {
            factor = g[v].keep - shared.transition[(label[v] < 0 ? 0 : label[v]) * kRow<C> + i] * g[v].drop;
          }
          e[i][v] = e[i][v] * factor + (i == diagonal ? g[v].diag : 0.0f);
        }
        store_vector<kStorage, kVector>(s.cm_gradient, to, e[i]);
      }
    }
    if (j == 0) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const bool left = (small >> v & 1) != 0;
        mark<kVector>(s, tile * kGroups<C> + group, v, left);
        if (!inside || left) continue;
        float trace = 0.0f;
#pragma unroll
        for (int k = 0; k < C; ++k) trace += shared.diagonal[group][k][slot + v];
        const int64_t at = place.pixel(region) + v;
        const bool labelled = label[v] >= 0;
        add_pixel(s, at, labelled ? weight_at(s, label[v], at) : 0.0f, labelled ? -log_f32(evidence[v]) : 0.0f, trace,
                  shared.terms[group][lane]);
      }
    }
  }
  if (j == 0) leave_sums(s, static_cast<int64_t>(blockIdx.x) * kGroups<C> + group, shared.terms[group][lane]);
}

// Whether runs of kVector pixels start on their own boundaries everywhere, and none is cut at the end.
template <Storage kStorage>
bool aligned(const Stream<float>& s, const cuda::PixelRegion& region, int vector) {
  using T = typename StorageOf<kStorage>::Type;
  const auto whole = [&](int64_t n) { return n % vector == 0; };
  const auto starts = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % (vector * sizeof(T)) == 0; };
  return whole(region.plane) && whole(region.span) && whole(s.cm_batch_stride) &&
         whole(region.gradient_batch_stride) && starts(s.cm_logits) && starts(s.cm_gradient);
}

template <int C, Storage kStorage, int kVector, bool kOneHot>
cuda::Error launch_fast(const Stream<float>& s, const cuda::PixelRegion& region, void* stream) {
  constexpr int64_t kTile = kGroups<C> * kWarp * kVector;
  constexpr size_t kShared = sizeof(FastShared<C, kVector>);
  const auto kernel = pixel_fast<C, kStorage, kVector, kOneHot>;
  const int64_t tiles = (region.span + kTile - 1) / kTile * region.images;
  const int64_t resident = resident_blocks(kernel, kFastThreads<C>, kShared), rows = cuda::kSumRows / kGroups<C>;
  const int64_t most = resident < rows ? resident : rows;
  if (cuda::Error error = launch(kernel, tiles < most ? tiles : most, kFastThreads<C>, kShared, stream, s, region,
                                 static_cast<unsigned>(tiles))) {
    return error;
  }
  return cuda::pixel_log_space(s, region, kVector, tiles / region.images * kGroups<C> * kVector, stream);
}

template <Storage kStorage>
cuda::Error pixel_grid_fast(const Stream<float>& s, const cuda::PixelRegion& region, void* stream) {
  cuda::Error error = "no fast kernel for this number of classes";
  with_fast_classes(s.classes, [&](auto classes) {
    constexpr int C = decltype(classes)::value, kVector = kWidestVector<C, kStorage>;
    if constexpr (kVector > 1) {
      if (aligned<kStorage>(s, region, kVector)) {
        error = s.transition == nullptr ? launch_fast<C, kStorage, kVector, true>(s, region, stream)
                                        : launch_fast<C, kStorage, kVector, false>(s, region, stream);
        return;
      }
    }
    error = s.transition == nullptr ? launch_fast<C, kStorage, 1, true>(s, region, stream)
                                    : launch_fast<C, kStorage, 1, false>(s, region, stream);
  });
  return error;
}

}  // namespace
}  // namespace coarse
