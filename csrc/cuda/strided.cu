// CM logits on a grid of cells, fused: 2 to 20 classes, float arithmetic, one or two axes. No intermediate at pixel
// resolution.
//
// A tile is up to kRows rows of the pixels of a few neighbouring grid cells: a lane is a column of pixels, 32 / L cells
// of L lanes each, and a warp is one column j of A. Down a column of pixels inside one cell the logits are linear, so
// their exponentials are a geometric sequence (as in cpu/strided_grid.h):
//
//   e[row] = e0 g^row,   e0 = exp(a[first row] - m),   g = exp(slope)
//
// Two exponentials, four loads of corners and five shuffles for each class pair serve all rows; a row costs a multiply
// and two multiply-adds going forward (e, Z, q), three going back (the coefficient, and a Horner scheme for the sums of
// v[row] e[row] and row v[row] e[row]). At C = 19, stride 8: an estimate of 12 instructions for each pixel and class
// pair, 0.6 ms of an H200's float lanes for two streams of 1024 x 2048; the bytes take 0.12 ms. Measured: 4.2
// (benchmarks/NOTES.md).
//
// The sums over rows meet the sums over the lanes of a cell by shuffles, and go to the four corners of the cell with an
// add to memory that nobody waits for. No two adds of one launch meet the same address: launches take every second row
// and column of tiles, parts of a large cell have copies of the gradient of their own. So the result is the same from
// run to run. Tiles whose logits are too steep, or whose evidence is too small, are marked, and left to a second launch
// that goes pixel by pixel in log space.
#include "class_logits.h"
#include "launch.h"
#include "log_space.h"
#include "strided_tiles.h"

namespace coarse {
namespace {

constexpr int kMostStridedClasses = 20;  // 21 warps would have 80 registers each, and spill
constexpr int kLoadsAhead = 4;           // entries of a column whose corners are loaded at a time
constexpr float kMaxSpan = 20.0f;        // as in cpu/strided_grid.h: lost terms are below exp(-87 + 20) of the
constexpr float kSmallestGeometricEvidence = 1e-12f;  // largest of their row, and so below 1e-17 of the result

template <int kMost>
struct StridedShared {
  float p[kRows][kMost][kWarp];  // class logits, then p[j]
  float q[kRows][kMost][kWarp];
  float inv_z[kRows][kMost][kWarp];
  float diagonal[kRows][kMost][kWarp];
  int label[kRows][kWarp];  // -1: none
  float d[kRows][kWarp];    // p(label); 0 without a label
  float scaled[kRows][kWarp];
  float scale;
  volatile unsigned tile, next_tile;
  StridedPlace place[kWarp];
  ClassTile of_class;
  float transition[kMost * kMost];  // [y][i]: lanes of one label read one word
};

template <int kMost>
constexpr int kStridedThreads = kMost * kWarp;

// Class logit j at a lane's pixels of row r, from a grid of their own.
__device__ __forceinline__ float class_logit(const Layer<float>& s, const ClassTile& tile, int64_t image, int j,
                                             int lane, int r) {
  const int columns = s.seg_grid[2], x0 = tile.x0 + tile.column[lane], y0 = tile.y0 + tile.row[r];
  const bool two_x = columns < s.width && x0 + 1 < columns;  // else the neighbour is not read, as in `Corners`
  const bool two_y = s.seg_grid[1] < s.height && y0 + 1 < s.seg_grid[1];
  const float right = tile.right[lane], below = tile.below[r];
  const int64_t upper = (image * s.classes + j) * s.seg_points() + static_cast<int64_t>(y0) * columns + x0;
  const auto along_x = [&](int64_t at) {
    const float a = load_as<float>(s.seg_logits, s.seg_storage, at);
    return two_x ? (1.0f - right) * a + right * load_as<float>(s.seg_logits, s.seg_storage, at + 1) : a;
  };
  const float a = along_x(upper);
  return two_y ? (1.0f - below) * a + below * along_x(upper + columns) : a;
}

// What a warp's pixels have for the points of class j: rows of pixels first, each lane for itself, then lanes. `values`
// and `rows` have a row of kWarp for each row of pixels, and of points, `pitch` apart.
__device__ __forceinline__ void write_class_tile(const Layer<float>& s, const Tiling& t, const ClassTile& tile, int j,
                                                 const float* values, float* rows, int pitch) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int y = 0; y < t.class_rows; ++y) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += tile.share_y(r, y) * values[r * pitch + lane];
    rows[y * pitch + lane] = sum;
  }
  __syncwarp();
  float* const to = s.class_tiles + tile.at + j * t.class_points();
  for (int k = lane; k < t.class_points(); k += kWarp) {
    const int y = k / t.class_columns, x = k - y * t.class_columns;
    float sum = 0.0f;
    for (int from = tile.begin[x]; from < tile.end[x]; ++from) sum += tile.share_x(from, x) * rows[y * pitch + from];
    to[k] = sum;
  }
}

// Where the row of T of each row of pixels begins: looked up once, so that an entry is one load. Two in a register.
struct ReportedRows {
  unsigned pairs[kRows / 2];

  __device__ __forceinline__ void look_up(const int (&label)[kRows][kWarp], int classes) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      const int first = label[r][lane], second = label[r + 1][lane];
      pairs[r / 2] = static_cast<unsigned>(((first < 0 ? 0 : first) | (second < 0 ? 0 : second) << 16) * classes);
    }
  }
  __device__ __forceinline__ unsigned of(int r) const {
    return r % 2 == 0 ? pairs[r / 2] & 0xffffu : pairs[r / 2] >> 16;
  }
};
static_assert(kRows % 2 == 0);

// The grid points of column j that a tile reads, columns `first` to `last` of two rows of each plane, on their way
// while labels are looked at. Later each lane loads its four corners of one plane after the other, and would wait each
// time.
__device__ __forceinline__ void touch_field(const Layer<float>& s, const StridedPlace& place, int first, int last,
                                            int64_t points, int j, int classes) {
  const int size = s.cm_storage == Storage::f32 ? 4 : 2, step = 32 / size;  // a sector of a line
  const char* const field = static_cast<const char*>(s.cm_logits) + place.field * size;
  for (int x = first; x < last + step; x += step) {
    for (int k = threadIdx.x % kWarp; k < 2 * classes; k += kWarp) {
      const int64_t plane = (k / 2 * classes + j) * points + (k % 2 == 0 ? place.upper : place.lower);
      touch(field + (plane + (x < last ? x : last)) * size);
    }
  }
}

template <int kLeast, int kMost>
__global__ void __launch_bounds__(kStridedThreads<kMost>,
                                  kStridedThreads<kMost> > 256 ? 1 : 512 / kStridedThreads<kMost>)
    strided_fast(const __grid_constant__ Layer<float> s, const __grid_constant__ Tiling t) {
  auto& shared = *reinterpret_cast<StridedShared<kMost>*>(dynamic_shared());
  const int C = kLeast == kMost ? kMost : s.classes;
  const int lane = threadIdx.x % kWarp, j = threadIdx.x / kWarp;
  const bool one_hot = s.transition == nullptr;
  for (int k = threadIdx.x; k < C * C; k += C * kWarp) {
    const int i = k / C, y = k % C;
    shared.transition[y * C + i] = one_hot ? (i == y ? 1.0f : 0.0f) : s.transition[k];
  }
  if (threadIdx.x == 0) {
    shared.scale = gradient_scale(s);
    shared.next_tile = blockIdx.x;
  }
  const bool want_cm = s.cm_gradient != nullptr;
  const int64_t pixels = s.pixels(), points = t.y.grid * t.x.grid;
  Terms terms;

  // In 32 bits: each tile has a word of its own in Layer::small_mask. In shared memory, as registers are dear.
  const unsigned tiles = static_cast<unsigned>(t.tiles_per_image * t.images);
  while (true) {
    __syncthreads();  // the tile before has been read
    if (shared.next_tile >= tiles) break;
    if (j == 0) shared.place[lane] = StridedPlace(s, t, shared.next_tile, shared.of_class);
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.tile = shared.next_tile;
      shared.next_tile = shared.tile + gridDim.x;
      s.small_mask[shared.tile] = 0;
    }
    const StridedPlace& place = shared.place[lane];
    const int rows = place.rows;
    const bool inside = place.inside;
    if (rows == 0) continue;

    touch_field(s, place, shared.place[0].left, shared.place[kWarp - 1].right, points, j, C);
    // --- labels; a lane whose rows have one label needs one row of T
    int own_label = -1;
    bool one_label = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int y = inside && r < rows ? label_at(s, place.map(s, r)) : -1;
      if (j == 0) shared.label[r][lane] = y;
      if (y >= 0) {
        one_label &= own_label < 0 || own_label == y;
        own_label = y;
      }
    }
    __syncthreads();
    // All warps see the same pixels, so each can answer for the block.
    const bool drawn = __any_sync(kAllLanes, own_label >= 0);
    if (!drawn && !s.posterior) {
      for (int r = 0; inside && r < rows; ++r) {
        if (s.class_out != nullptr && !s.add_class)
          store_as(s.class_out, s.class_storage, place.of_class(s, j, r), 0.0f);
        if (j == 0 && s.nll_map != nullptr) write_maps(s, place.map(s, r), 0.0f, 0.0f);
      }
      if (s.class_tiles != nullptr) {
        float* const to = s.class_tiles + shared.of_class.at + j * t.class_points();
        for (int k = lane; k < t.class_points(); k += kWarp) to[k] = 0.0f;
      }
      continue;
    }
    const bool together = !__any_sync(kAllLanes, !one_label);
    const float* const own_reported = shared.transition + (own_label < 0 ? 0 : own_label) * C;
    if (!s.seg_on_pixels) {  // before registers are full
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {
        const bool read = shared.label[r][lane] >= 0 || (inside && r < rows && s.posterior);
        shared.p[r][j][lane] = read ? class_logit(s, shared.of_class, place.image, j, lane, r) : 0.0f;
      }
    }

    // --- forward: exponentials of this column, their sums Z and q
    const int64_t upper = place.upper, lower = place.lower;
    const bool used = inside && own_label >= 0;
    float e0[kMost], g[kMost], top = -std::numeric_limits<float>::infinity();
    bool steep = false;
    read_as_stored(s.cm_storage, [&](auto stored) {
      constexpr Storage kStorage = decltype(stored)::value;
      using T = typename StorageOf<kStorage>::Type;
      const T* plane = static_cast<const T*>(s.cm_logits) + place.field + j * points;
      // in 32 bits: a plane has fewer points than the image has pixels
      const int up = static_cast<int>(upper), down = static_cast<int>(lower);
      const int corner[4] = {up + place.left, up + place.right, down + place.left, down + place.right};
      const float right = place.lambda_x;
#pragma unroll
      for (int i = 0; i < kMost; ++i, plane += C * points) {
        if (beyond<kLeast>(i, C)) break;
        if (i % kLoadsAhead == 0) __syncwarp();  // or so many loads begin at once that registers spill
        // No branches: the points are there for every lane, the same one twice where there is no second, and then the
        // difference is 0. What an unlabelled pixel reads may be anything.
        const auto along_x = [&](int k) {
          const float a = decode<kStorage, float>(plane[corner[k]]), b = decode<kStorage, float>(plane[corner[k + 1]]);
          return fma(right, b - a, a);
        };
        const float above = along_x(0), below = along_x(2);
        const float a = used ? above : 0.0f, b = used ? below : 0.0f;
        e0[i] = a + place.lambda0 * (b - a);
        g[i] = place.step * (b - a);
        const float change = static_cast<float>(rows - 1) * g[i];
        steep |= !(change <= kMaxSpan && -change <= kMaxSpan && fabsf(e0[i]) < 1e30f);  // NaN and inf are steep
        top = fmaxf(fmaxf(e0[i], e0[i] + change), top);
      }
    });
    if (!used) top = 0.0f;
    ReportedRows reported;
    if (!together) reported.look_up(shared.label, C);
    float z[kRows], q[kRows], ejj = 0.0f, gjj = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) z[r] = q[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (beyond<kLeast>(i, C)) break;
      e0[i] = exp_f32(e0[i] - top);
      g[i] = exp_f32(g[i]);
      float e = e0[i];
      if (together) {
        const float reports = own_reported[i];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          z[r] += e;
          q[r] += reports * e;
          e *= g[i];
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          z[r] += e;
          q[r] += shared.transition[reported.of(r) + i] * e;
          e *= g[i];
        }
      }
      if (i == j) {
        ejj = e0[i];
        gjj = g[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inv_z = r < rows ? inverse(z[r]) : 0.0f;  // beyond the last row the sequence may have overflowed
      const bool read = shared.label[r][lane] >= 0 || (inside && r < rows && s.posterior);
      if (s.seg_on_pixels) {
        const int64_t at = (place.image * C + j) * pixels + place.pixel + r * s.width;
        shared.p[r][j][lane] = read ? load_as<float>(s.seg_logits, s.seg_storage, at) : 0.0f;
      }
      shared.inv_z[r][j][lane] = inv_z;
      shared.q[r][j][lane] = r < rows ? q[r] * inv_z : 0.0f;
      shared.diagonal[r][j][lane] = r < rows ? ejj * inv_z : 0.0f;
      ejj *= gjj;
    }
    __syncthreads();

    // --- pixel by pixel: p, D, loss. A warp takes every C-th row.
    bool small = false;
    for (int r = j; r < rows; r += C) {
      float seg_top = shared.p[r][0][lane], sum = 0.0f, d = 0.0f;
#pragma unroll
      for (int c = 1; c < kMost; ++c) {
        if (beyond<kLeast>(c, C)) break;
        seg_top = fmaxf(shared.p[r][c][lane], seg_top);
      }
#pragma unroll
      for (int c = 0; c < kMost; ++c) {
        if (beyond<kLeast>(c, C)) break;
        const float p = exp_f32(shared.p[r][c][lane] - seg_top);
        shared.p[r][c][lane] = p;
        sum += p;
        d += p * shared.q[r][c][lane];
      }
      const float inv_sum = inverse(sum);
#pragma unroll
      for (int c = 0; c < kMost; ++c) {
        if (beyond<kLeast>(c, C)) break;
        shared.p[r][c][lane] *= inv_sum;
      }
      d *= inv_sum;
      const int64_t pixel = place.map(s, r);
      const int y = shared.label[r][lane];
      const float weight = y >= 0 ? weight_at(s, y, pixel) : 0.0f;
      small |= y >= 0 && !(d >= kSmallestGeometricEvidence);
      shared.d[r][lane] = y >= 0 ? d : 0.0f;
      shared.scaled[r][lane] = weight * shared.scale;
    }
    if (__syncthreads_or(small || steep)) {
      if (threadIdx.x == 0) s.small_mask[shared.tile] = 1;
      continue;
    }

    // --- loss terms, once it is certain that they hold
    for (int r = j; r < rows; r += C) {
      float trace = 0.0f;
#pragma unroll
      for (int c = 0; c < kMost; ++c) {
        if (beyond<kLeast>(c, C)) break;
        trace += shared.diagonal[r][c][lane];
      }
      const int64_t pixel = place.map(s, r);
      const int y = shared.label[r][lane];
      const float weight = y >= 0 ? weight_at(s, y, pixel) : 0.0f;
      if (inside) add_pixel(s, pixel, weight, y >= 0 ? -log_f32(shared.d[r][lane]) : 0.0f, trace, terms);
    }

    // --- backward: coefficients of this column, then sums over the rows
    float keep[kRows], drop[kRows], sum_diagonal = 0.0f, sum_rows_diagonal = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      keep[r] = drop[r] = 0.0f;
      if (!inside || r >= rows) {
        shared.p[r][j][lane] = 0.0f;
        continue;
      }
      const float p = shared.p[r][j][lane], d = shared.d[r][lane], scaled = shared.scaled[r][lane];
      const float inv_d = d > 0.0f ? inverse(d) : 0.0f, posterior = p * shared.q[r][j][lane] * inv_d;
      const float own = !s.posterior ? scaled * (p - posterior) : d > 0.0f ? posterior : p;
      if (s.class_out != nullptr) put(s.class_out, s.class_storage, s.add_class, place.of_class(s, j, r), own);
      shared.p[r][j][lane] = own;
      const auto gradient = column_gradient(p, posterior, inv_d, shared.inv_z[r][j][lane], shared.diagonal[r][j][lane],
                                            scaled, scaled * s.trace_weight);
      keep[r] = gradient.keep;
      drop[r] = gradient.drop;
      sum_diagonal += gradient.diag;
      sum_rows_diagonal += static_cast<float>(r) * gradient.diag;
    }
    if (want_cm) {
      if (!together) reported.look_up(shared.label, C);  // again, rather than in registers meanwhile
      float* to = static_cast<float*>(s.cm_gradient) + place.gradient + j * points;
#pragma unroll
      for (int i = 0; i < kMost; ++i, to += C * points) {
        if (beyond<kLeast>(i, C)) break;
        float value = 0.0f, derivative = 0.0f;  // of the polynomial sum_r v[r] g^r
        if (together) {
          const float reports = own_reported[i];
#pragma unroll
          for (int r = kRows - 1; r >= 0; --r) {
            derivative = derivative * g[i] + value;
            value = value * g[i] + (keep[r] - drop[r] * reports);
          }
        } else {
#pragma unroll
          for (int r = kRows - 1; r >= 0; --r) {
            derivative = derivative * g[i] + value;
            value = value * g[i] + (keep[r] - drop[r] * shared.transition[reported.of(r) + i]);
          }
        }
        float sum = e0[i] * value, sum_rows = e0[i] * (g[i] * derivative);
        if (i == j) {
          sum += sum_diagonal;
          sum_rows += sum_rows_diagonal;
        }
        const float below = place.lambda0 * sum + place.step * sum_rows;
        place.corners.add(to, sum - below, below);
      }
    }
    if (s.class_tiles != nullptr)  // the exponentials are done with
      write_class_tile(s, t, shared.of_class, j, shared.p[0][j], shared.q[0][j], kMost * kWarp);
  }
  leave_sums(s, static_cast<int64_t>(blockIdx.x) * C + j, terms);
}

// Marked tiles, pixel by pixel: any number of classes, a block of kLogWarps warps that share the columns.
constexpr int kLogWarps = 8;

__global__ void __launch_bounds__(kLogWarps* kWarp)
    strided_log_space(const __grid_constant__ Layer<float> s, const __grid_constant__ Tiling t) {
  const int classes = s.classes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const ColumnShare<float> share{warp, kLogWarps, reinterpret_cast<float*>(dynamic_shared()) + lane, kWarp};
  // each warp has its own: their threads do not meet where they find out
  auto* const tiles = reinterpret_cast<ClassTile*>(reinterpret_cast<float*>(dynamic_shared()) + classes * kWarp);
  const float scale = gradient_scale(s);
  const int64_t points = t.y.grid * t.x.grid;
  Terms terms;
  for (int64_t tile = blockIdx.x; tile < t.tiles_per_image * t.images; tile += gridDim.x) {
    if (s.small_mask[tile] == 0) continue;
    ClassTile& of_class = tiles[warp];
    const StridedPlace place(s, t, tile, of_class);
    __syncwarp();
    const int64_t upper = place.upper, lower = place.lower;
    if (s.class_tiles != nullptr) {
      for (int j = share.first; j < classes; j += share.step) {
        float* const to = s.class_tiles + of_class.at + j * t.class_points();
        for (int k = lane; k < t.class_points(); k += kWarp) to[k] = 0.0f;
      }
      __syncwarp();
    }
    for (int r = 0; r < place.rows; ++r) {
      const int64_t at = place.map(s, r);
      const int label = place.inside ? label_at(s, at) : -1;
      const float weight = label >= 0 ? weight_at(s, label, at) : 0.0f, scaled = weight * scale;
      const float lambda = t.y.lambda(place.cell_y, place.y0 + r);
      const bool read_seg = label >= 0 || (place.inside && s.posterior);
      const ClassLogits<float> class_logits(s, place.image, read_seg ? place.pixel + r * s.width : 0);
      const auto seg = [&](int j) { return read_seg ? class_logits(j) : 0.0f; };
      const auto logit = [&](int i, int j) {
        if (label < 0) return 0.0f;
        const int64_t plane = place.field + (static_cast<int64_t>(i) * classes + j) * points;
        const float a = place.along_x(s, plane + upper);
        return upper == lower ? a : (1.0f - lambda) * a + lambda * place.along_x(s, plane + lower);
      };
      const auto emit = [&](int i, int j, float gradient) {
        const float below = lambda * gradient;
        const int64_t plane = (static_cast<int64_t>(i) * classes + j) * points;
        place.corners.add(static_cast<float*>(s.cm_gradient) + place.gradient + plane, gradient - below, below);
      };
      const auto seg_out = [&](int j, float p, float posterior) {
        const float gradient = scaled == 0.0f ? 0.0f : scaled * (p - posterior);
        if (s.class_out != nullptr && place.inside) {
          const float own = s.posterior ? (label >= 0 ? posterior : p) : gradient;
          put(s.class_out, s.class_storage, s.add_class, place.of_class(s, j, r), own);
        }
        if (s.class_tiles == nullptr) return;
        float* const to = s.class_tiles + of_class.at + j * t.class_points() + of_class.row[r] * t.class_columns;
        for (int x = 0; x < t.class_columns; ++x) {
          const float share_x = of_class.share_x(lane, x), sum = warp_sum(share_x == 0.0f ? 0.0f : share_x * gradient);
          if (lane != 0) continue;
          to[x] += (1.0f - of_class.below[r]) * sum;
          if (of_class.below[r] != 0.0f) to[t.class_columns + x] += of_class.below[r] * sum;
        }
      };
      const auto result = log_space(s, share, label, scaled, scaled * s.trace_weight, s.cm_gradient != nullptr, seg,
                                    logit, emit, seg_out);
      if (warp == 0 && place.inside) add_pixel(s, at, weight, result.nll, result.trace, terms);
    }
  }
  if (warp == 0) leave_sums(s, blockIdx.x, terms);
}

// The gradient of class logits on a grid of their own, from what the tiles of these images have for it. `lanes` lanes
// of a warp are one entry: they share its rows of tiles, in fixed order.
constexpr int kGatherThreads = 256;

__global__ void __launch_bounds__(kGatherThreads, 2)
    gather_class_tiles(const __grid_constant__ Layer<float> s, const __grid_constant__ Tiling t, int lanes,
                       float* gradient) {
  const int lane = threadIdx.x % lanes, rows = s.seg_grid[1], columns = s.seg_grid[2];
  const int64_t points = s.seg_points(), entries = t.images * s.classes * points;
  const int64_t first_entry = (static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x) / lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kGatherThreads / lanes;
  // the pixels that read a point
  const auto first_of = [](int64_t point, int64_t grid, int64_t pixels) {
    return grid == pixels ? point : point == 0 ? 0 : first_pixel<float>(point - 1, grid, pixels);
  };
  const auto end_of = [](int64_t point, int64_t grid, int64_t pixels) {
    return grid == pixels ? point + 1 : point + 1 >= grid ? pixels : first_pixel<float>(point + 1, grid, pixels);
  };
  // as many rounds for all lanes of a warp, which meet in shuffles
  for (int64_t round = 0; round < (entries + step - 1) / step; ++round) {
    const bool exists = first_entry + round * step < entries;
    const int64_t entry = exists ? first_entry + round * step : 0, point = entry % points;
    const int64_t gy = point / columns, gx = point % columns;
    const int64_t image = entry / points / s.classes;
    const int j = static_cast<int>(entry / points % s.classes);
    const int64_t x_begin = first_of(gx, columns, s.width), x_end = end_of(gx, columns, s.width);
    const int64_t y_end = end_of(gy, rows, s.height);
    float sum = 0.0f;
    int turn = 0;
    for (int64_t y = first_of(gy, rows, s.height); y < y_end; ++turn) {
      const int64_t cell_y = t.y.cell_of(y), cell_begin = t.y.begin(cell_y), cell_end = t.y.end(cell_y);
      const int64_t band = (y - cell_begin) / kRows, tile_y = cell_begin + band * kRows;
      y = tile_y + kRows < cell_end ? tile_y + kRows : cell_end;
      if (turn % lanes != lane) continue;
      const int64_t from_y = gy - ClassTap(tile_y, rows, s.height).first;
      for (int64_t x = x_begin; x < x_end;) {
        const int64_t cell_x = t.x.cell_of(x), run = (cell_x - t.x.first) / t.cells_per_tile();
        const int64_t first_cell = t.x.first + run * t.cells_per_tile(), begin = t.x.begin(first_cell);
        int64_t last_cell = first_cell + t.cells_per_tile() - 1;
        last_cell = last_cell < t.x.first + t.x.cells ? last_cell : t.x.first + t.x.cells - 1;
        const int64_t end = t.x.end(last_cell), split = t.splits == 1 ? 0 : (x - begin) / t.lanes;
        const int64_t tile_x = begin + split * t.lanes;
        x = t.splits > 1 && tile_x + t.lanes < end ? tile_x + t.lanes : end;
        const int64_t from_x = gx - ClassTap(tile_x, columns, s.width).first;
        const int64_t at = t.class_tile(image, cell_y - t.y.first, band, run, split, s.classes, j);
        sum += s.class_tiles[at + from_y * t.class_columns + from_x];
      }
    }
    for (int of = lanes / 2; of > 0; of /= 2) sum += __shfl_xor_sync(kAllLanes, sum, of);
    if (exists && lane == 0) gradient[((t.image + image) * s.classes + j) * points + point] += sum;
  }
}

CellAxis cell_axis(int64_t grid, int64_t pixels) {
  return grid == 1 ? CellAxis{grid, pixels, 0, 1} : CellAxis{grid, pixels, -1, grid + 1};
}

// Pixels of the widest cell. Exact where the stride is a power of two; else positions are rounded, and may be one more.
int64_t widest(const CellAxis& axis) {
  if (axis.grid == 1) return axis.pixels;
  const int64_t stride = axis.pixels / axis.grid;
  if (stride * axis.grid == axis.pixels && (stride & (stride - 1)) == 0) return stride;
  return (axis.pixels + axis.grid - 1) / axis.grid + 1;
}

// Points of a grid that `n` neighbouring pixels of an axis read, at most.
int points_read(int64_t n, int64_t grid, int64_t pixels) {
  if (grid == pixels) return static_cast<int>(n);
  const int64_t stride = pixels / grid, span = (n - 1) * grid / pixels;
  const bool exact = stride * grid == pixels && (stride & (stride - 1)) == 0 && pixels <= 1 << 22;
  const int64_t most = span + (exact ? 3 : 4);  // else positions are rounded
  return static_cast<int>(grid < most ? grid : most);
}

Tiling tiling_of(const Layer<float>& s, const cuda::Grid& grid) {
  Tiling t{};
  t.y = cell_axis(grid.size[1], s.height);
  t.x = cell_axis(grid.size[2], s.width);
  const int64_t width = widest(t.x);
  t.lanes = 4;
  while (t.lanes < kWarp && t.lanes < width) t.lanes *= 2;
  t.splits = (width + t.lanes - 1) / t.lanes;
  t.bands = (widest(t.y) + kRows - 1) / kRows;
  t.tiles_y = t.y.cells;
  t.tiles_x = (t.x.cells + kWarp / t.lanes - 1) / (kWarp / t.lanes);
  t.copy_stride = static_cast<int64_t>(s.classes) * s.classes * grid.points() * s.cm_batch;
  const int64_t height = widest(t.y), most = t.splits > 1 ? t.lanes : kWarp / t.lanes * width;
  t.class_rows = points_read(height < kRows ? height : kRows, s.seg_grid[1], s.height);
  t.class_columns = points_read(most < kWarp ? most : kWarp, s.seg_grid[2], s.width);
  return t;
}

constexpr int64_t kMostCopyBytes = int64_t{64} << 20;  // of several images in one launch
constexpr int64_t kMostCopies = int64_t{256} << 20;    // bytes of one image, beyond which the general way is taken

int64_t within(int64_t most, int64_t n) { return most < 1 ? 1 : most < n ? most : n; }

// Images that run in one launch. Those of one field need copies of its gradient.
int64_t images_at_once(const Layer<float>& s, const Tiling& t, bool want_cm, bool class_tiles) {
  int64_t images = s.batch;
  if (want_cm && s.cm_batch == 1 && images > 1)
    images = within(kMostCopyBytes / (4 * t.copy_stride * t.bands * t.splits), images);
  if (class_tiles && images > 1)
    images = within(kMostCopyBytes / (4 * t.all_tiles() * s.classes * t.class_points()), images);
  return images;
}

}  // namespace

namespace cuda {

StridedPlan plan_strided(const Layer<float>& s, const Grid& grid, bool want_cm, bool want_seg) {
  StridedPlan plan;
  const auto halved = [](int64_t points, int64_t pixels) { return points == 1 || 2 * points <= pixels; };
  const auto few = [&](int points, int64_t pixels) { return points == pixels || halved(points, pixels); };
  const bool class_tiles = want_seg && !s.seg_on_pixels;
  const auto refusal = [&] {
    if (s.classes < 2 || s.classes > kMostStridedClasses) return Refusal::classes;
    if (s.transition_gradient != nullptr) return Refusal::learned;
    if (s.depth != 1) return Refusal::volume;
    if (!halved(grid.size[1], s.height) || !halved(grid.size[2], s.width)) return Refusal::dense;
    // Positions round in float there, and a cell may be wider than `widest` says.
    if (s.height > 1 << 24 || s.width > 1 << 24) return Refusal::long_axis;
    if (class_tiles && !(few(s.seg_grid[1], s.height) && few(s.seg_grid[2], s.width))) return Refusal::class_grid;
    return Refusal::none;
  };
  plan.refusal = refusal();
  if (plan.refusal != Refusal::none) return plan;
  const Tiling t = tiling_of(s, grid);
  const int64_t images = images_at_once(s, t, want_cm, class_tiles), own = t.bands * t.splits;
  plan.copies = want_cm ? own * (s.cm_batch == 1 ? images : 1) : 1;
  plan.mask_words = t.all_tiles() * s.batch;
  if (class_tiles) plan.class_floats = images * t.all_tiles() * s.classes * t.class_points();
  if (plan.copies > 1 && 4 * t.copy_stride * plan.copies > kMostCopies) plan.refusal = Refusal::copies;
  return plan;
}

Error strided_grid(const Layer<float>& s, const Grid& grid, float* class_gradient, void* stream) {
  Tiling t = tiling_of(s, grid);
  const bool want_cm = s.cm_gradient != nullptr, class_tiles = s.class_tiles != nullptr;
  // Neighbouring tiles share grid points, so where they add, every second one goes first.
  t.step_y = want_cm && t.tiles_y > 1 ? 2 : 1;
  t.step_x = want_cm && t.tiles_x > 1 ? 2 : 1;
  const int64_t group = images_at_once(s, t, want_cm, class_tiles);
  t.copies_per_image = s.cm_batch == 1 ? t.bands * t.splits : 0;
  t.image_stride = s.cm_batch == 1 ? 0 : static_cast<int64_t>(s.classes) * s.classes * grid.points();
  Error error = nullptr;
  with_class_bound<kMostStridedClasses, 17>(s.classes, [&](auto bound) {
    constexpr int kLeast = decltype(bound)::least, kMost = decltype(bound)::most;
    constexpr size_t kShared = sizeof(StridedShared<kMost>);
    static_assert(kShared <= 99 * 1024, "what a block may have on compute capability 8.6, 8.9 and 12.0");
    const auto kernel = strided_fast<kLeast, kMost>;
    const int C = s.classes, threads = C * kWarp;
    const int64_t resident = resident_blocks(kernel, threads, kShared), rows = kSumRows / C;
    const int64_t most = resident < rows ? resident : rows;
    const size_t log_shared = sizeof(float) * C * kWarp + sizeof(ClassTile) * kLogWarps;
    const int64_t log_resident = resident_blocks(strided_log_space, kLogWarps * kWarp, log_shared);
    const int64_t log_blocks = log_resident < kSumRows ? log_resident : kSumRows;
    for (t.image = 0; t.image < s.batch; t.image += group) {
      t.images = s.batch - t.image < group ? s.batch - t.image : group;
      for (t.colour_y = 0; t.colour_y < t.step_y; ++t.colour_y) {
        for (t.colour_x = 0; t.colour_x < t.step_x; ++t.colour_x) {
          t.columns = (t.tiles_x - t.colour_x + t.step_x - 1) / t.step_x * t.splits;
          t.tiles_per_image = t.columns * ((t.tiles_y - t.colour_y + t.step_y - 1) / t.step_y) * t.bands;
          const int64_t tiles = t.tiles_per_image * t.images;
          error = launch(kernel, tiles < most ? tiles : most, threads, kShared, stream, s, t);
          if (error != nullptr) return;
          // mostly nothing is marked, so a few blocks look through the tiles
          error = launch(strided_log_space, tiles < log_blocks ? tiles : log_blocks, kLogWarps * kWarp, log_shared,
                         stream, s, t);
          if (error != nullptr) return;
        }
      }
      if (!class_tiles) continue;
      // points with many tiles are few
      const int lanes = s.seg_points() < 1024 ? kWarp : 1;
      const int64_t gather = (t.images * C * s.seg_points() * lanes + kGatherThreads - 1) / kGatherThreads;
      const int64_t at_once = 4 * resident_blocks(gather_class_tiles, kGatherThreads, 0);
      error = launch(gather_class_tiles, gather < at_once ? gather : at_once, kGatherThreads, 0, stream, s, t, lanes,
                     class_gradient);
      if (error != nullptr) return;
    }
  });
  return error;
}

}  // namespace cuda
}  // namespace coarse

#if defined(COARSE_EMULATED)  // for a test
extern "C" bool coarse_strided_fits(int classes, int64_t height, int64_t width, int64_t grid_h, int64_t grid_w) {
  coarse::Layer<float> s;
  s.batch = s.cm_batch = 1;
  s.classes = classes;
  s.height = height;
  s.width = width;
  return coarse::cuda::plan_strided(s, {{1, grid_h, grid_w}}, true, true).refusal == coarse::cuda::Refusal::none;
}
#endif
