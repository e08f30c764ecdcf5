// CM logits on the pixel grid, the fast way: 2 to 21 classes in float, bfloat16 or float16. Every logit is read once
// and every gradient written once.
//
// A warp is one column j of 32 neighbouring pixels (or 32 runs of kVector pixels): a thread holds its column's C
// logits, then their exponentials, in registers. The C warps of a group meet twice, through shared memory: for the
// softmax over the class logits, and for D = sum_j p[j] q[j]. The gradient is formed from the registers and streamed
// out.
//
// The limit should be memory: (2 C C + 2 C) elements and a label a pixel, 3041 bytes in float at C = 19, which take
// 5200 cycles of an H200's multiprocessor for 32 pixels (4.3 TB/s over 132 of them at 1.75 GHz). Measured there: 8300
// cycles, in which the C warps of a tile issue 13800 instructions, of them C C exponentials, 730 cycles of the
// special-function unit; half of the time no warp can issue, because it waits for a load. In bfloat16 the bytes are
// half and the cycles as many. A thread issues its C loads at once, 46 KB a block at C = 19, and two blocks fit a
// multiprocessor at 48 registers, so that one loads while the other computes. Blocks loop over tiles. Prefetching the
// next tile to L2 gave nothing (benchmarks/NOTES.md).
//
// So in the loops over i there is nothing but what every entry needs. The entries that are special, A[j,j] for the
// trace and A[y,j] of a positive drawing, are loaded a second time (from cache) and stored a second time.
#pragma once

#include "device.h"
#include "launch.h"

namespace coarse {
namespace cuda {
Error pixel_log_space(const Layer<float>& s, const PixelRegion& region, int vector, int64_t words, void* stream);
}
namespace {

// Kernels have bounds kMost on the number of classes C, not a kernel for each: C is the number of warps, and only what
// a thread holds in registers needs a bound (`with_class_bound`).

// Groups of 32 runs in a block, so that few classes make a block of some size.
template <int kMost>
constexpr bool kGrouped = kMost <= 4;
COARSE_HD int groups_of(int classes) { return classes <= 4 ? 8 / classes : 1; }
template <int kMost>
constexpr int kMostGroups = kGrouped<kMost> ? 4 : 1;

// Pixels of a thread: enough loads in flight where there are few classes, one where registers are dear.
template <int kMost, Storage kStorage>
constexpr int kWidestVector = kStorage == Storage::f32 ? (kMost <= 4   ? 4
                                                          : kMost <= 8 ? 2
                                                                       : 1)
                                                       : (kMost <= 8    ? 4
                                                          : kMost <= 12 ? 2
                                                                        : 1);

template <int kMost>
constexpr int kFastThreads = (kGrouped<kMost> ? 8 : kMost) * kWarp;

// Blocks of a multiprocessor that the compiler is to leave registers for: 38 warps of 48 registers at C = 19.
template <int kMost, int kVector>
constexpr int kFastBlocks = kVector > 1 || kMost > 19 ? 1 : 2;

// A pixel's C values in shared memory, read four at a time: an odd number of quadruples, so that the lanes of a warp
// are in different banks.
template <int kMost>
constexpr int kRow = ((kMost + 3) / 4 | 1) * 4;

template <int kMost>
struct alignas(16) Row {
  float of[kRow<kMost>];

  // f(k, value) for the first `classes`, which are kLeast or more.
  template <int kLeast, class F>
  __device__ __forceinline__ void each(int classes, const F& f) const {
    struct alignas(16) Four {
      float x[4];
    };
#pragma unroll
    for (int k = 0; k < kMost; k += 4) {
      if (beyond<kLeast>(k, classes)) continue;
      const Four four = *reinterpret_cast<const Four*>(of + k);
#pragma unroll
      for (int n = 0; n < 4 && k + n < kMost; ++n) {
        if (!beyond<kLeast>(k + n, classes)) f(k + n, four.x[n]);
      }
    }
  }
};

template <int kMost, int kVector>
struct FastShared {
  Row<kMost> seg[kMostGroups<kMost>][kWarp * kVector];       // class logits
  Row<kMost> p[kMostGroups<kMost>][kWarp * kVector];         // exp(s[j] - top)
  Row<kMost> pq[kMostGroups<kMost>][kWarp * kVector];        // times q[j]
  Row<kMost> diagonal[kMostGroups<kMost>][kWarp * kVector];  // A[j,j]
  Row<kMost> transition[kMost];                              // T[i,y] at [y][i]
  // not in registers, which are dear
  Terms terms[kMostGroups<kMost>][kWarp];            // of the warps with j = 0
  float trace[kMostGroups<kMost>][kWarp * kVector];  // of their pixels
  float scale;
  volatile int image[kFastThreads<kMost>], offset[kFastThreads<kMost>];  // Place
  volatile int label[kVector][kFastThreads<kMost>];
  volatile float own[kVector][kFastThreads<kMost>];  // what goes to class logit j
  volatile float inv_z[kVector][kFastThreads<kMost>];
  volatile float evidence[kMostGroups<kMost>][kWarp * kVector];
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
__device__ __forceinline__ void load_vector(const typename StorageOf<kStorage>::Type* p, float* to) {
  using T = typename StorageOf<kStorage>::Type;
  using Word = typename Chunk<kVector * sizeof(T)>::Type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(p));
  T x[kVector];
  memcpy(x, &word, sizeof(word));
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = decode<kStorage, float>(x[v]);
}

template <Storage kStorage, int kVector>
__device__ __forceinline__ void store_vector(typename StorageOf<kStorage>::Type* p, const float* from) {
  using T = typename StorageOf<kStorage>::Type;
  using Word = typename Chunk<kVector * sizeof(T)>::Type;
  T x[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) x[v] = encode<kStorage>(from[v]);
  Word word;
  memcpy(&word, x, sizeof(word));
  __stcs(reinterpret_cast<Word*>(p), word);
}

// True for all threads that share a group if it is for any of them. The warps of a group see the same pixels, so where
// a block is one group a warp can answer for all; else this is a barrier.
template <int kMost>
__device__ __forceinline__ bool any_of_block(bool predicate) {
  if constexpr (!kGrouped<kMost>) return __any_sync(kAllLanes, predicate);
  return __syncthreads_or(predicate);
}

// Where a thread of a tile works: two numbers, from which addresses are made where they are needed.
template <int kVector>
struct Place {
  int image, offset;  // of the region, and of the pixel in that
  bool inside;        // a run is inside as a whole: kVector > 1 only where it divides the span

  __device__ __forceinline__ Place(const cuda::PixelRegion& region, unsigned tile, int groups, int group) {
    const unsigned per_tile = groups * kWarp * kVector;
    const unsigned span = static_cast<unsigned>(region.span), tiles = (span + per_tile - 1) / per_tile;
    image = static_cast<int>(tile / tiles);
    offset = static_cast<int>(tile % tiles * per_tile + (group * kWarp + threadIdx.x % kWarp) * kVector);
    inside = static_cast<unsigned>(offset) < span;
  }
  // in labels, weights and maps
  __device__ __forceinline__ int64_t map(const Layer<float>& s, const cuda::PixelRegion& region) const {
    return map_at(s, region.image + image, region.begin + offset);
  }
  __device__ __forceinline__ int64_t seg(const Layer<float>& s, int j) const {
    return image * s.seg_image + j * s.seg_plane + offset;
  }
  __device__ __forceinline__ int64_t of_class(const Layer<float>& s, int j) const {
    return image * s.class_image + j * s.class_plane + offset;
  }
  // Addresses of the next section are made anew: registers are dearer than instructions.
  template <class Shared>
  __device__ __forceinline__ void keep(Shared& shared) const {
    shared.image[threadIdx.x] = image;
    shared.offset[threadIdx.x] = inside ? offset : -1;
  }
  template <class Shared>
  __device__ __forceinline__ void again(const Shared& shared) {
    image = shared.image[threadIdx.x];
    offset = shared.offset[threadIdx.x];
    inside = offset >= 0;
  }
  // a[0, j], and its gradient
  __device__ __forceinline__ int64_t cm(const Layer<float>& s, const cuda::PixelRegion& region, int j) const {
    return image * s.cm_batch_stride + j * region.plane + offset;
  }
  __device__ __forceinline__ int64_t gradient(const cuda::PixelRegion& region, int j) const {
    return image * region.gradient_batch_stride + j * region.plane + offset;
  }
};

// Which of a warp's pixels v are left to log space.
template <int kVector>
__device__ __forceinline__ void mark(const Layer<float>& s, unsigned warp_of_pixels, int v, bool small) {
  const unsigned mask = __ballot_sync(kAllLanes, small);
  if (threadIdx.x % kWarp == 0) s.small_mask[static_cast<int64_t>(warp_of_pixels) * kVector + v] = mask;
}

// The same column, `rows` rows further. Bytes, so that the step is an operand from constant memory.
template <class T>
__device__ __forceinline__ T* below(T* p, const cuda::PixelRegion& region, int rows = 1) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + rows * region.row_bytes);
}

// kLeast = kMost: C is known to the compiler.
template <int kLeast, int kMost, Storage kStorage, int kVector>
__global__ void __launch_bounds__(kFastThreads<kMost>, kFastBlocks<kMost, kVector>)
    pixel_fast(const __grid_constant__ Layer<float> s, const __grid_constant__ cuda::PixelRegion region,
               unsigned tiles) {
  using T = typename StorageOf<kStorage>::Type;
  auto& shared = *reinterpret_cast<FastShared<kMost, kVector>*>(dynamic_shared());
  const int C = kLeast == kMost ? kMost : s.classes, groups = kGrouped<kMost> ? groups_of(C) : 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int j = kGrouped<kMost> ? warp % C : warp, group = kGrouped<kMost> ? warp / C : 0, slot = lane * kVector;
  const bool one_hot = s.transition == nullptr;
  if (!one_hot) {
    for (int k = threadIdx.x; k < C * C; k += groups * C * kWarp) shared.transition[k % C].of[k / C] = s.transition[k];
  }
  if (threadIdx.x == 0) shared.scale = gradient_scale(s);
  if (j == 0) shared.terms[group][lane] = Terms{};
  __syncthreads();

  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Place<kVector> place(region, tile, groups, group);
    int label[kVector];
    bool any_labelled = false, all_labelled = true;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      label[v] = place.inside ? label_at(s, place.map(s, region) + v) : -1;
      any_labelled |= label[v] >= 0;
      all_labelled &= label[v] >= 0;
    }

    // A tile that nobody drew on: zeros, and nothing read.
    if (!any_of_block<kMost>(any_labelled) && !s.posterior) {
      if (j == 0) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) mark<kVector>(s, tile * groups + group, v, false);
      }
      if (!place.inside) continue;
      const float zeros[kVector] = {};
      if (s.cm_gradient != nullptr && !s.add_cm) {
        T* to = static_cast<T*>(s.cm_gradient) + place.gradient(region, j);
#pragma unroll
        for (int i = 0; i < kMost; ++i, to = below(to, region)) {
          if (beyond<kLeast>(i, C)) break;
          store_vector<kStorage, kVector>(to, zeros);
        }
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (s.class_out != nullptr && !s.add_class)
          store_as(s.class_out, s.class_storage, place.of_class(s, j) + v, 0.0f);
        if (j == 0 && s.nll_map != nullptr) write_maps(s, place.map(s, region) + v, 0.0f, 0.0f);
      }
      continue;
    }

    place.keep(shared);
#pragma unroll
    for (int v = 0; v < kVector; ++v) shared.label[v][threadIdx.x] = label[v];
    // --- read; logits of pixels without a label may be anything, and count as 0
    float e[kMost][kVector], eyj[kVector];
    {
      const T* const column = static_cast<const T*>(s.cm_logits) + place.cm(s, region, j);
      const T* from = column;
#pragma unroll
      for (int i = 0; i < kMost; ++i, from = below(from, region)) {
        if (beyond<kLeast>(i, C)) break;
#pragma unroll
        for (int v = 0; v < kVector; ++v) e[i][v] = 0.0f;
        if (any_labelled) load_vector<kStorage, kVector>(from, e[i]);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const bool labelled = label[v] >= 0;
        shared.diagonal[group][slot + v].of[j] = labelled ? decode<kStorage, float>(below(column, region, j)[v]) : 0.0f;
        eyj[v] = one_hot && labelled ? decode<kStorage, float>(below(column, region, label[v])[v]) : 0.0f;
        const bool read = labelled || (place.inside && s.posterior);
        shared.seg[group][slot + v].of[j] =
            read ? load_as<float>(s.seg_logits, s.seg_storage, place.seg(s, j) + v) : 0.0f;
      }
    }
    if constexpr (kVector > 1) {
      if (!all_labelled) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          if (beyond<kLeast>(i, C)) break;
#pragma unroll
          for (int v = 0; v < kVector; ++v) e[i][v] = label[v] >= 0 ? e[i][v] : 0.0f;
        }
      }
    }

    // --- this column: exponentials, Z and q
    float q[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float top = e[0][v];
#pragma unroll
      for (int i = 1; i < kMost; ++i) {
        if (beyond<kLeast>(i, C)) break;
        top = fmaxf(e[i][v], top);
      }
      float z = 0.0f;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (beyond<kLeast>(i, C)) break;
        e[i][v] = exp_f32(e[i][v] - top);
        z += e[i][v];
      }
      const float inv_z = inverse(z);
      shared.inv_z[v][threadIdx.x] = inv_z;
      float& own = shared.diagonal[group][slot + v].of[j];
      own = exp_f32(own - top) * inv_z;
      float sum = 0.0f;
      if (one_hot) {
        eyj[v] = exp_f32(eyj[v] - top);
        sum = eyj[v];
      } else {
        shared.transition[label[v] < 0 ? 0 : label[v]].template each<kLeast>(
            C, [&](int i, float reports) { sum += reports * e[i][v]; });
      }
      q[v] = sum * inv_z;
    }

    // --- the pixel: p and D. What a thread needs again it reads back from shared memory: registers are dearer.
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float top = -std::numeric_limits<float>::infinity();
      shared.seg[group][slot + v].template each<kLeast>(C, [&](int, float x) { top = fmaxf(x, top); });
      const float p = exp_f32(shared.seg[group][slot + v].of[j] - top);
      shared.p[group][slot + v].of[j] = p;
      shared.pq[group][slot + v].of[j] = p * q[v];
      if (j == 0) {
        float trace = 0.0f;
        shared.diagonal[group][slot + v].template each<kLeast>(C, [&](int, float x) { trace += x; });
        shared.trace[group][slot + v] = trace;
      }
    }
    __syncthreads();
    place.again(shared);
#pragma unroll
    for (int v = 0; v < kVector; ++v) label[v] = shared.label[v][threadIdx.x];
    // Which pixels are too small for this is the same in all warps of the group: they sum the same numbers.
    ColumnGradient<float> g[kVector];
    unsigned small = 0;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float sum = 0.0f, d = 0.0f;
      shared.p[group][slot + v].template each<kLeast>(C, [&](int, float x) { sum += x; });
      shared.pq[group][slot + v].template each<kLeast>(C, [&](int, float x) { d += x; });
      const float inv_sum = inverse(sum);
      d *= inv_sum;
      const bool labelled = label[v] >= 0, fast = !labelled || d >= kSmallestEvidence<float>;
      small |= static_cast<unsigned>(!fast) << v;
      const float weight = labelled ? weight_at(s, label[v], place.map(s, region) + v) : 0.0f;
      // not those that are left to the next launch, which may add to what this one writes
      const float scaled = fast ? weight * shared.scale : 0.0f;
      const float inv_d = fast && labelled ? inverse(d) : 0.0f, p = shared.p[group][slot + v].of[j] * inv_sum;
      const float r = shared.pq[group][slot + v].of[j] * inv_sum * inv_d;
      g[v] = column_gradient(p, r, inv_d, shared.inv_z[v][threadIdx.x], shared.diagonal[group][slot + v].of[j], scaled,
                             scaled * s.trace_weight);
      shared.own[v][threadIdx.x] = !s.posterior ? scaled * (p - r) : labelled ? r : p;
      if (j == 0) shared.evidence[group][slot + v] = d;
    }

    place.again(shared);
    // --- the gradient; of pixels that are too small only until the next launch
    if (s.cm_gradient != nullptr && place.inside) {
      T* to = static_cast<T*>(s.cm_gradient) + place.gradient(region, j);
      const bool add = kStorage == Storage::f32 && s.add_cm;  // there is something only in float
      const auto write = [&](float* values) {
        if constexpr (kStorage == Storage::f32) {
          if (add) {
            float before[kVector];
            load_vector<kStorage, kVector>(to, before);
#pragma unroll
            for (int v = 0; v < kVector; ++v) values[v] += before[v];
          }
        }
        store_vector<kStorage, kVector>(to, values);
      };
      if (one_hot) {
#pragma unroll
        for (int i = 0; i < kMost; ++i, to = below(to, region)) {
          if (beyond<kLeast>(i, C)) break;
#pragma unroll
          for (int v = 0; v < kVector; ++v) e[i][v] *= g[v].keep;
          write(e[i]);
        }
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          shared.transition[label[v] < 0 ? 0 : label[v]].template each<kLeast>(
              C, [&](int i, float reports) { e[i][v] *= g[v].keep - reports * g[v].drop; });
        }
#pragma unroll
        for (int i = 0; i < kMost; ++i, to = below(to, region)) {
          if (beyond<kLeast>(i, C)) break;
          write(e[i]);
        }
      }
      place.again(shared);
      T* const column = static_cast<T*>(s.cm_gradient) + place.gradient(region, j);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (label[v] < 0) continue;
        // `more`: than what the loops above have left there
        const auto again = [&](int i, float all, float more) {
          T* const at = below(column, region, i) + v;
          if constexpr (kStorage == Storage::f32) {
            if (add) {
              *at += more;
              return;
            }
          }
          *at = encode<kStorage>(all);
        };
        const bool diagonal = s.trace_weight != 0.0f;
        const float ejj = shared.diagonal[group][slot + v].of[j] * inverse(shared.inv_z[v][threadIdx.x]);
        if (one_hot) {
          const float diag = label[v] == j ? g[v].diag : 0.0f;
          again(label[v], eyj[v] * (g[v].keep - g[v].drop) + diag, diag - eyj[v] * g[v].drop);
          if (diagonal && label[v] != j) again(j, ejj * g[v].keep + g[v].diag, g[v].diag);
        } else if (diagonal) {
          again(j, ejj * (g[v].keep - shared.transition[label[v]].of[j] * g[v].drop) + g[v].diag, g[v].diag);
        }
      }
    }

    place.again(shared);
#pragma unroll
    for (int v = 0; v < kVector; ++v) label[v] = shared.label[v][threadIdx.x];
    // --- the pixel's own outputs
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const bool left = (small >> v & 1) != 0;
      if (j == 0) mark<kVector>(s, tile * groups + group, v, left);
      if (!place.inside || left) continue;
      if (s.class_out != nullptr)
        put(s.class_out, s.class_storage, s.add_class, place.of_class(s, j) + v, shared.own[v][threadIdx.x]);
      if (j != 0) continue;
      const int64_t at = place.map(s, region) + v;
      const bool labelled = label[v] >= 0;
      add_pixel(s, at, labelled ? weight_at(s, label[v], at) : 0.0f,
                labelled ? -log_f32(shared.evidence[group][slot + v]) : 0.0f, shared.trace[group][slot + v],
                shared.terms[group][lane]);
    }
  }
  if (j == 0) leave_sums(s, static_cast<int64_t>(blockIdx.x) * groups + group, shared.terms[group][lane]);
}

// Whether runs of kVector pixels start on their own boundaries everywhere, and none is cut at the end.
template <Storage kStorage>
bool aligned(const Layer<float>& s, const cuda::PixelRegion& region, int vector) {
  using T = typename StorageOf<kStorage>::Type;
  const auto whole = [&](int64_t n) { return n % vector == 0; };
  const auto starts = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % (vector * sizeof(T)) == 0; };
  return whole(region.plane) && whole(region.span) && whole(s.cm_batch_stride) && whole(region.gradient_batch_stride) &&
         starts(s.cm_logits) && starts(s.cm_gradient);
}

template <int kLeast, int kMost, Storage kStorage, int kVector>
cuda::Error launch_fast(const Layer<float>& s, cuda::PixelRegion region, void* stream) {
  region.row_bytes = s.classes * region.plane * static_cast<int64_t>(sizeof(typename StorageOf<kStorage>::Type));
  constexpr size_t kShared = sizeof(FastShared<kMost, kVector>);
  const auto kernel = pixel_fast<kLeast, kMost, kStorage, kVector>;
  const int groups = groups_of(s.classes), threads = groups * s.classes * kWarp;
  const int64_t tile = groups * kWarp * kVector, tiles = (region.span + tile - 1) / tile * region.images;
  const int64_t resident = resident_blocks(kernel, threads, kShared), rows = cuda::kSumRows / groups;
  const int64_t most = resident < rows ? resident : rows;
  if (cuda::Error error = launch(kernel, tiles < most ? tiles : most, threads, kShared, stream, s, region,
                                 static_cast<unsigned>(tiles))) {
    return error;
  }
  return cuda::pixel_log_space(s, region, kVector, tiles / region.images * groups * kVector, stream);
}

template <Storage kStorage>
cuda::Error pixel_grid_fast(const Layer<float>& s, const cuda::PixelRegion& region, void* stream) {
  cuda::Error error = "no fast kernel for this number of classes";
  with_class_bound<kMaxFastClasses>(s.classes, [&](auto bound) {
    constexpr int kLeast = decltype(bound)::least, kMost = decltype(bound)::most;
    constexpr int kVector = kWidestVector<kMost, kStorage>;
    if constexpr (kVector > 1) {
      if (aligned<kStorage>(s, region, kVector)) {
        error = launch_fast<kLeast, kMost, kStorage, kVector>(s, region, stream);
        return;
      }
    }
    error = launch_fast<kLeast, kMost, kStorage, 1>(s, region, stream);
  });
  return error;
}

}  // namespace
}  // namespace coarse
