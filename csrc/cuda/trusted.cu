// Trusted drawings, A = I: cross-entropy after upsampling, and complementary labels. Every kind and layer in one pass.
//
//   s[j]    class logits at the pixel, interpolated where they have a grid of their own
//   Z       = sum_j exp(s[j] - top),                     top = max_j s[j];  p[j] = exp(s[j] - top) / Z
//   Z_y     = sum_j T[j,y] exp(s[j] - top_y),            top_y = max of s[j] over T[j,y] > 0
//   nll     = (top - top_y) + (log Z - log Z_y)          = log_sum - s[y] where T = I: top_y = s[y], Z_y = 1
//   r[j]    = T[j,y] exp(s[j] - top_y) / Z_y             one-hot where T = I
//
//   d nll / d s[j]    = p[j] - r[j]
//   d nll / dT[i,y]   = -p[i] / D = -exp(s[i] - top_y) / Z_y
//
// This is log space at all times, for one exponential a class and a label more than probabilities would need: every
// exponential is of a difference of two logits, so nothing underflows that counts. A label that no class explains
// (Z_y = 0): nll = inf, and no gradient.
//
// trusted_pixels: a thread is a pixel. One loop over classes finds Z and every Z_y together (online: a new maximum
// rescales the sum), a second one writes the gradient where the logits are on the pixel grid:
//
//   bytes       C reads and C writes of the storage type and the labels' own; the second reading comes from cache while
//               C times the threads of a multiprocessor fit there (C = 32 in float: 256 KB), else from memory again
//   operations  two exponentials and about 20 instructions a class
//
// A coarser grid is read through the cache, four taps a class and pixel, and its gradient is gathered (trusted_gather):
// nothing has the size of C planes of pixels. A thread, or a group of 2 to 256, is a cell between four grid points; it
// runs over the cell's pixels with the four logits in registers, forms p[j] - r[j] anew and sums it four times, for
// each corner; a grid point then adds what its four cells have for it, in shared memory. Each sum belongs to one
// thread: no atomics, and the same order in every run.
//
//   bytes       8 a pixel and 4 a label (8 where T is not I), written once, and read once for each chunk of classes
//               (from cache for every four classes); the labels' own, twice
//   operations  forward about 30 a class and pixel, gathering about 16, times 1.14 for the cells that two tiles share
//               (twice that in volumes, where a slice of cells lies between two planes of grid points)
//
// Estimate for C = 19, one layer, T = I, stride 4, 1024 x 2048: 40 M classes and pixels, 1.9 G operations, 0.07 ms of
// an H200's lanes; 26 bytes a pixel, 55 MB, 0.011 ms. On the pixel grid in float: 1.2 G operations, 0.04 ms, and 320 MB
// (480 MB where the second reading misses the cache), 0.07 to 0.1 ms. Not measured.
#include "class_logits.h"
#include "launch.h"
#include "trusted.h"

namespace coarse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
using cuda::kHeldLayers;

// Of a multiprocessor: as many as leave each thread the registers that it needs.
template <class R, bool kOneLayer>
constexpr int kBlocks = sizeof(R) == 8 ? 1
                        : kOneLayer    ? 3
                                       : 2;

// --- class logits of a pixel -----------------------------------------------------------------------------------------

struct OnPixels {  // in place of Corners
  int pixel;
  template <class Load>
  __device__ __forceinline__ auto interpolate(const Load& load) const {
    return load(pixel);
  }
};

template <bool kCoarse, class R>
__device__ __forceinline__ auto corners_of(const Trusted<R>& t, int pixel) {
  if constexpr (kCoarse) {
    return Corners<R>(t.grid, t.size[0], t.size[1], t.size[2], pixel);
  } else {
    return OnPixels{pixel};
  }
}

// s[j] of one pixel.
template <Storage kStorage, class R, bool kCoarse>
struct Logits {
  using T = typename StorageOf<kStorage>::Type;
  const T* data;
  int64_t plane;
  decltype(corners_of<kCoarse>(Trusted<R>{}, 0)) corners;

  __device__ __forceinline__ Logits(const Trusted<R>& t, int64_t image, int pixel)
      : data(static_cast<const T*>(t.seg_logits) + image * t.classes * t.points()),
        plane(t.points()),
        corners(corners_of<kCoarse>(t, pixel)) {}

  __device__ __forceinline__ R operator()(int j) const {
    const T* const of = data + j * plane;
    return corners.interpolate([&](int k) { return decode<kStorage, R>(read_only(of + k)); });
  }
};

// --- labels ----------------------------------------------------------------------------------------------------------

// A layer of a kind; the one after it.
struct LayerAt {
  int kind = 0;
  int64_t layer = 0;

  template <class R>
  __device__ __forceinline__ void settle(const Trusted<R>& t) {  // kinds may have no layers
    while (kind < t.kind_count && layer == t.kinds[kind].layers) {
      ++kind;
      layer = 0;
    }
  }
  template <class R>
  __device__ __forceinline__ void next(const Trusted<R>& t) {
    ++layer;
    settle(t);
  }
  // Of the labels, weights and maps.
  template <class R>
  __device__ __forceinline__ int64_t offset(const Trusted<R>& t, int64_t image, int pixel) const {
    return (image * t.kinds[kind].layers + layer) * t.pixels() + pixel;
  }
};

template <class R>
__device__ __forceinline__ int label_of(const Trusted<R>& t, const TrustedKind<R>& kind, int64_t at) {
  return valid_label(kind.labels, kind.label_type, at, t.ignore_index, t.classes);
}

// weight * r[j] of a label that counts, from share = weight / Z_y. `column`: T[.,y], null where T = I.
template <class R>
__device__ __forceinline__ R explained(const R* column, int classes, int label, R share, R top, int j, R x) {
  if (column == nullptr) return j == label ? share : R(0);
  const R reports = column[static_cast<int64_t>(j) * classes];
  return reports > R(0) ? share * (reports * exp_v(x - top)) : R(0);
}

// The same from what trusted_pixels has left, subtracted from the values of classes j, j + 1, ...
template <class R, int N>
__device__ __forceinline__ void take_explained(const Trusted<R>& t, const TrustedKind<R>& kind, int64_t at,
                                               int64_t label_at, int j, const R (&s)[N], R (&value)[N]) {
  const R share = t.share[at];
  if (share == R(0)) return;
  const int label = label_of(t, kind, label_at);
  const R* const column = kind.transition != nullptr ? kind.transition + label : nullptr;
  const R top = column != nullptr ? t.layer_top[at] : R(0);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int of = j + n < t.classes ? j + n : t.classes - 1;
    value[n] -= explained(column, t.classes, label, share, top, of, s[n]);
  }
}

// Of all labels of a pixel.
template <class R, int N>
__device__ __forceinline__ void take_all_explained(const Trusted<R>& t, int64_t image, int pixel, int j,
                                                   const R (&s)[N], R (&value)[N]) {
  const int64_t all = t.batch * t.pixels();
  int64_t at = image * t.pixels() + pixel;
  for (int k = 0; k < t.kind_count; ++k) {
    const TrustedKind<R>& kind = t.kinds[k];
    int64_t label_at = image * kind.layers * t.pixels() + pixel;
    for (int64_t layer = 0; layer < kind.layers; ++layer, at += all, label_at += t.pixels())
      take_explained(t, kind, at, label_at, j, s, value);
  }
}

// Other kinds add to what is in R.
template <Storage kStorage, class R>
__device__ __forceinline__ void write_gradient(const Trusted<R>& t, int64_t at, R gradient) {
  if (t.gradient_in_r) {
    static_cast<R*>(t.gradient)[at] = gradient;
  } else {
    static_cast<typename StorageOf<kStorage>::Type*>(t.gradient)[at] = encode<kStorage>(gradient);
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// sum += t exp(x - top) where x may be a new maximum. -inf adds nothing; NaN is to be seen.
template <class R>
struct OnlineSum {
  R top = -std::numeric_limits<R>::infinity(), sum = 0;

  __device__ __forceinline__ void add(R x, R t) {
    const R inf = std::numeric_limits<R>::infinity(), difference = x - top;
    const R e = x == -inf ? R(0) : exp_v(difference > R(0) ? -difference : difference);
    sum = difference > R(0) ? sum * e + t : sum + t * e;
    top = difference > R(0) ? x : top;
  }
};

template <class R>
struct Held {       // a label of the pixel, while its layer is at work
  int label;        // -1: none
  R weight, share;  // `share` as Trusted::share
  const R* column;  // T[.,y]; null where T = I
  OnlineSum<R> report;
};

// kHeld layers at a time; where there are no more than that, they are kept for the second loop.
template <Storage kStorage, class R, bool kCoarse, int kHeld>
__global__ void __launch_bounds__(kThreads, kBlocks<R, kHeld == 1>)
    trusted_pixels(const __grid_constant__ Trusted<R> t) {
  const R inf = std::numeric_limits<R>::infinity();
  const int64_t pixels = t.pixels(), per_image = (pixels + kThreads - 1) / kThreads, all = t.batch * pixels;
  const int classes = t.classes;
  const bool all_held = t.layers <= kHeld;
  constexpr int kUnroll = kCoarse ? 1 : 4;  // taps are loads enough to wait for
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  double terms[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) terms[h] = 0;

  for (int64_t tile = blockIdx.x; tile < per_image * t.batch; tile += gridDim.x) {
    const int64_t image = tile / per_image, own = (tile - image * per_image) * kThreads + threadIdx.x;
    const bool inside = own < pixels;
    const int pixel = inside ? static_cast<int>(own) : 0;
    const Logits<kStorage, R, kCoarse> logits(t, image, pixel);
    OnlineSum<R> total;
    R mass = 0;
    bool drawn = false;
    Held<R> held[kHeld];
    LayerAt cursor;
    cursor.settle(t);

    for (int64_t first = 0; first < t.layers; first += kHeld) {
      LayerAt place = cursor;
      bool any = false;
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        held[h] = {-1, R(0), R(0), nullptr, {}};
        if (first + h >= t.layers) continue;
        if (inside) {
          const TrustedKind<R>& kind = t.kinds[place.kind];
          const int64_t at = place.offset(t, image, pixel);
          const int label = label_of(t, kind, at);
          if (label >= 0) {
            R weight = kind.class_weight != nullptr ? kind.class_weight[label] : R(1);
            if (kind.pixel_weight != nullptr) weight *= kind.pixel_weight[at];
            held[h].label = label;
            held[h].weight = weight;
            held[h].column = kind.transition != nullptr ? kind.transition + label : nullptr;
            any = true;
          }
        }
        place.next(t);
      }
      if (any) {
        drawn = true;
        total = {};
#pragma unroll kUnroll
        for (int j = 0; j < classes; ++j) {
          const R x = logits(j);
          total.add(x, R(1));
#pragma unroll
          for (int h = 0; h < kHeld; ++h) {
            if (held[h].label < 0) continue;
            if (held[h].column == nullptr) {
              if (j == held[h].label) held[h].report = {x, x == -inf ? R(0) : R(1)};
            } else {
              const R reports = held[h].column[static_cast<int64_t>(j) * classes];
              if (reports > R(0)) held[h].report.add(x, reports);
            }
          }
        }
        // as torch has it: nothing but -inf, or +inf among them, is no distribution
        if (total.top == inf || total.top == -inf) total.sum = std::numeric_limits<R>::quiet_NaN();
      }

#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        if (first + h >= t.layers) continue;
        const TrustedKind<R>& kind = t.kinds[cursor.kind];
        const Held<R>& label = held[h];
        R term = 0;
        if (label.label >= 0) {
          const bool impossible = label.report.sum == R(0) && total.sum == total.sum;
          const R nll = (total.top - label.report.top) + (log_v(total.sum) - log_v(label.report.sum));
          term = label.weight == R(0) ? R(0) : label.weight * (impossible ? inf : nll);
          const double factor = (kind.scale != nullptr ? static_cast<double>(*kind.scale) : 1.0) * kind.weight;
          const R live = impossible ? R(0) : label.weight * static_cast<R>(factor);
          held[h].share = live == R(0) ? R(0) : live / label.report.sum;
          mass += live;
        }
        if (inside) {
          if (kind.nll_map != nullptr) {
            const int64_t at = cursor.offset(t, image, pixel);
            kind.nll_map[at] = term;
            kind.loss_map[at] = term;
          }
          if (t.share != nullptr) {
            const int64_t at = (first + h) * all + image * pixels + pixel;
            t.share[at] = held[h].share;
            if (kind.transition != nullptr) t.layer_top[at] = label.report.top;
          }
        }
        if (all_held) {
          terms[h] += static_cast<double>(term);
        } else {
          const double sum = warp_sum(static_cast<double>(term));
          if (threadIdx.x % kWarp == 0) kind.sums[2 * row] += sum;
        }
        cursor.next(t);
      }
    }

    const R factor = mass == R(0) ? R(0) : mass / total.sum;
    if (!inside) continue;
    if (t.factor != nullptr) {
      t.top[image * pixels + pixel] = drawn ? total.top : R(0);
      t.factor[image * pixels + pixel] = factor;
    }
    if constexpr (!kCoarse) {
      if (t.gradient == nullptr) continue;
      int64_t to = image * classes * pixels + pixel;
#pragma unroll kUnroll
      for (int j = 0; j < classes; ++j, to += pixels) {
        R gradient = 0;
        if (drawn) {
          const R x = logits(j);
          if (factor != R(0)) gradient = factor * exp_v(x - total.top);
          if (all_held) {
#pragma unroll
            for (int h = 0; h < kHeld; ++h) {
              const Held<R>& label = held[h];
              if (!(label.share == R(0)))
                gradient -= explained(label.column, classes, label.label, label.share, label.report.top, j, x);
            }
          } else {
            const R at_j[1] = {x};
            R left[1] = {gradient};
            take_all_explained(t, image, pixel, j, at_j, left);
            gradient = left[0];
          }
        }
        write_gradient<kStorage>(t, to, gradient);
      }
    }
  }

  if (!all_held) return;
  LayerAt place;
  place.settle(t);
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (h >= t.layers) continue;
    const double sum = warp_sum(terms[h]);
    if (threadIdx.x % kWarp == 0) t.kinds[place.kind].sums[2 * row] += sum;
    place.next(t);
  }
}

// --- gradient on a coarser grid --------------------------------------------------------------------------------------

// How the grid is cut into tiles of points, of one plane along z each, and who works on a cell: `across` times `down`
// threads. Cell c of an axis has the pixels that read points c and c + 1. A tile's points need their own cells and
// those before them.
struct Cells {
  int height, width;  // cells of a tile
  int rows, columns;  // points of a tile
  int tiles_y, tiles_x;
  int across, down, slots;  // slots: sums of a cell in shared memory, one for each warp that works on it
  int chunks, chunk;        // of classes
};

constexpr int kTileSums = 256;  // cells times slots of a tile

// First pixel of cell `cell` of an axis; the cell of the last point ends with the axis.
template <class R>
__device__ __forceinline__ int cell_begin(int cell, int in, int out) {
  if (cell <= 0) return 0;
  return cell >= in ? out : static_cast<int>(first_pixel<R>(cell, in, out));
}

// Where a pixel lies between points `cell` and cell + 1.
template <class R>
__device__ __forceinline__ R lambda_in(int pixel, int cell, int in, int out, R scale) {
  if (in == out || cell + 1 >= in) return R(0);
  const R lambda = scale * (static_cast<R>(pixel) + R(0.5)) - R(0.5) - static_cast<R>(cell);
  return lambda < R(0) ? R(0) : lambda > R(1) ? R(1) : lambda;
}

// kTogether classes at a time: what a pixel has is read once for all of them.
template <Storage kStorage, class R, bool kOneLayer, int kTogether>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 ? 1 : 2)
    trusted_gather(const __grid_constant__ Trusted<R> t, const __grid_constant__ Cells c) {
  using T = typename StorageOf<kStorage>::Type;
  const int sums_step = c.height * c.width * c.slots;
  R* const shared = reinterpret_cast<R*>(dynamic_shared());                         // [class][corner][cell][slot]
  int* const begin_y = reinterpret_cast<int*>(shared + 4 * kTogether * sums_step);  // first pixel of each cell
  int* const begin_x = begin_y + c.height + 1;
  const int depth = t.size[0], height = t.size[1], width = t.size[2];
  const int grid_z = t.grid[0], grid_y = t.grid[1], grid_x = t.grid[2];
  const int64_t pixels = t.pixels(), points = t.points(), area = static_cast<int64_t>(grid_y) * grid_x;
  const R scale_z = static_cast<R>(grid_z) / static_cast<R>(depth);
  const R scale_y = static_cast<R>(grid_y) / static_cast<R>(height);
  const R scale_x = static_cast<R>(grid_x) / static_cast<R>(width);
  const int lanes = c.across * c.down, at_once = kThreads / lanes, lane = threadIdx.x % lanes;
  const int64_t tiles = static_cast<int64_t>(c.tiles_y) * c.tiles_x, units = tiles * c.chunks * grid_z * t.batch;

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int tile_x = static_cast<int>(unit % c.tiles_x), tile_y = static_cast<int>(unit / c.tiles_x % c.tiles_y);
    const int64_t above = unit / tiles;
    const int chunk = static_cast<int>(above % c.chunks), gz = static_cast<int>(above / c.chunks % grid_z);
    const int64_t image = above / c.chunks / grid_z;
    const int y0 = tile_y * c.rows, x0 = tile_x * c.columns;  // first point
    const int first_y = y0 > 0 ? y0 - 1 : 0, first_x = x0 > 0 ? x0 - 1 : 0;
    const int last_y = y0 + c.rows < grid_y ? y0 + c.rows : grid_y;
    const int last_x = x0 + c.columns < grid_x ? x0 + c.columns : grid_x;
    const int cells_y = last_y - first_y, cells_x = last_x - first_x, cells = cells_y * cells_x;
    for (int k = threadIdx.x; k <= cells_y; k += kThreads) begin_y[k] = cell_begin<R>(first_y + k, grid_y, height);
    for (int k = threadIdx.x; k <= cells_x; k += kThreads) begin_x[k] = cell_begin<R>(first_x + k, grid_x, width);
    const int begin_z = cell_begin<R>(gz - 1, grid_z, depth), end_z = cell_begin<R>(gz + 1, grid_z, depth);
    const int middle_z = cell_begin<R>(gz, grid_z, depth);
    __syncthreads();

    const int first_class = chunk * c.chunk;
    const int last_class = first_class + c.chunk < t.classes ? first_class + c.chunk : t.classes;
    for (int j = first_class; j < last_class; j += kTogether) {
      const T* const planes = static_cast<const T*>(t.seg_logits) + (image * t.classes + j) * points;
      for (int first_cell = 0; first_cell < cells; first_cell += at_once) {
        const int cell = first_cell + threadIdx.x / lanes;
        R sums[kTogether][4] = {};
        if (cell < cells) {
          const int own_y = cell / cells_x, own_x = cell - own_y * cells_x;
          const int cy = first_y + own_y, cx = first_x + own_x;
          const bool two_y = cy + 1 < grid_y, two_x = cx + 1 < grid_x;
          const int row_end = begin_y[own_y + 1], column_end = begin_x[own_x + 1];
          for (int z = begin_z; z < end_z; ++z) {
            const int cz = z < middle_z ? gz - 1 : gz;
            const bool two_z = cz + 1 < grid_z;
            const R lambda_z = lambda_in(z, cz, grid_z, depth, scale_z);
            const R of_z = cz == gz ? R(1) - lambda_z : lambda_z;
            if (of_z == R(0)) continue;
            R corners[kTogether][4];
#pragma unroll
            for (int n = 0; n < kTogether; ++n) {
              // beyond the last class: the last one's again, for nobody
              const int of = j + n < last_class ? n : last_class - 1 - j;
              const T* const at = planes + of * points + cz * area + static_cast<int64_t>(cy) * grid_x + cx;
              const auto corner = [&](int64_t offset) {
                const R front = decode<kStorage, R>(read_only(at + offset));
                if (!two_z) return front;
                return Between<R>{lambda_z, false}(front, decode<kStorage, R>(read_only(at + area + offset)));
              };
              corners[n][0] = corner(0);
              corners[n][1] = two_x ? corner(1) : corners[n][0];
              corners[n][2] = two_y ? corner(grid_x) : corners[n][0];
              corners[n][3] = two_y && two_x ? corner(grid_x + 1) : two_y ? corners[n][2] : corners[n][1];
            }
            for (int y = begin_y[own_y] + lane / c.across; y < row_end; y += c.down) {
              const R lambda_y = lambda_in(y, cy, grid_y, height, scale_y);
              const Between<R> along_y{lambda_y, !two_y};
              const int row = (z * height + y) * width;
              R left[kTogether], right[kTogether];
              R near[kTogether] = {}, far[kTogether] = {};  // what goes to the points on the left, on the right
#pragma unroll
              for (int n = 0; n < kTogether; ++n) {
                left[n] = along_y(corners[n][0], corners[n][2]);
                right[n] = along_y(corners[n][1], corners[n][3]);
              }
              for (int x = begin_x[own_x] + lane % c.across; x < column_end; x += c.across) {
                const R lambda_x = lambda_in(x, cx, grid_x, width, scale_x);
                const int64_t at_pixel = image * pixels + row + x;
                const R factor = read_only(t.factor + at_pixel), top = read_only(t.top + at_pixel);
                R s[kTogether], value[kTogether];
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                  s[n] = Between<R>{lambda_x, !two_x}(left[n], right[n]);
                  value[n] = factor == R(0) ? R(0) : factor * exp_v(s[n] - top);
                }
                if constexpr (kOneLayer) {
                  take_explained(t, t.kinds[0], at_pixel, at_pixel, j, s, value);
                } else {
                  take_all_explained(t, image, row + x, j, s, value);
                }
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                  near[n] += (R(1) - lambda_x) * value[n];
                  far[n] += lambda_x * value[n];
                }
              }
              const R upper = of_z * (R(1) - lambda_y), lower = of_z * lambda_y;
#pragma unroll
              for (int n = 0; n < kTogether; ++n) {
                sums[n][0] += upper * near[n];
                sums[n][1] += upper * far[n];
                sums[n][2] += lower * near[n];
                sums[n][3] += lower * far[n];
              }
            }
          }
        }
        const int together = lanes < kWarp ? lanes : kWarp;
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          for (int step = together / 2; step > 0; step /= 2) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[n][k] += __shfl_xor_sync(kAllLanes, sums[n][k], step);
          }
          if (cell < cells && threadIdx.x % together == 0) {
#pragma unroll
            for (int k = 0; k < 4; ++k) shared[(4 * n + k) * sums_step + cell * c.slots + lane / kWarp] = sums[n][k];
          }
        }
      }
      __syncthreads();
      const int own_columns = last_x - x0, own_points = (last_y - y0) * own_columns;
      const int classes = last_class - j < kTogether ? last_class - j : kTogether;
      for (int k = threadIdx.x; k < own_points * classes; k += kThreads) {
        const int n = k / own_points, point = k - n * own_points;
        const int y = y0 + point / own_columns, x = x0 + point % own_columns;
        R sum = 0;
        const auto add = [&](int corner, int cy, int cx) {
          if (cy < first_y || cx < first_x) return;
          const int cell = (cy - first_y) * cells_x + cx - first_x;
          const R* const from = shared + (4 * n + corner) * sums_step + cell * c.slots;
          for (int slot = 0; slot < c.slots; ++slot) sum += from[slot];
        };
        add(0, y, x);
        add(1, y, x - 1);
        add(2, y - 1, x);
        add(3, y - 1, x - 1);
        const int64_t to = (image * t.classes + j + n) * points + gz * area + static_cast<int64_t>(y) * grid_x + x;
        write_gradient<kStorage>(t, to, sum);
      }
      __syncthreads();
    }
  }
}

// --- gradient of a transition ----------------------------------------------------------------------------------------

// A block takes 32 pixels at a time, a lane each; its warps share the classes. Each sum over the pixels of a block
// belongs to one warp, which adds the labels that its lanes hold one after the other: the order is fixed.
template <Storage kStorage, class R>
__global__ void __launch_bounds__(kThreads, kBlocks<R, false>)
    trusted_transition(const __grid_constant__ Trusted<R> t, int of_kind, int64_t first_layer, double* slices) {
  const TrustedKind<R>& kind = t.kinds[of_kind];
  const int classes = t.classes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t pixels = t.pixels(), per_image = (pixels + kWarp - 1) / kWarp;
  double* const sums = slices + static_cast<int64_t>(blockIdx.x) * classes * classes;
  for (int64_t word = blockIdx.x; word < per_image * t.batch; word += gridDim.x) {
    const int64_t image = word / per_image, own = (word - image * per_image) * kWarp + lane;
    const bool inside = own < pixels;
    const int pixel = inside ? static_cast<int>(own) : 0;
    const Logits<kStorage, R, true> logits(t, image, pixel);
    for (int64_t layer = 0; layer < kind.layers; ++layer) {
      const int64_t at = ((first_layer + layer) * t.batch + image) * pixels + pixel;
      const R share = inside ? t.share[at] : R(0);
      const int label = share != R(0) ? label_of(t, kind, (image * kind.layers + layer) * pixels + pixel) : -1;
      if (!__any_sync(kAllLanes, label >= 0)) continue;
      const R top = label >= 0 ? t.layer_top[at] : R(0);
      for (int i = warp; i < classes; i += kWarps) {
        const R value = label >= 0 ? scaled_exp(share, logits(i) - top) : R(0);
        unsigned left = __ballot_sync(kAllLanes, label >= 0);
        while (left != 0) {
          const int y = __shfl_sync(kAllLanes, label, __ffs(left) - 1);
          const double total = warp_sum(label == y ? static_cast<double>(value) : 0.0);
          if (lane == 0) sums[static_cast<int64_t>(i) * classes + y] -= total;
          left &= ~__ballot_sync(kAllLanes, label == y);
        }
      }
    }
  }
}

// --- the most probable class -----------------------------------------------------------------------------------------

// The first of equals, and NaN before all, as torch.argmax has it.
template <Storage kStorage, class R, bool kCoarse>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 ? 1 : 4)
    trusted_labels(const __grid_constant__ Trusted<R> t) {
  const int64_t pixels = t.pixels(), per_image = (pixels + kThreads - 1) / kThreads;
  for (int64_t tile = blockIdx.x; tile < per_image * t.batch; tile += gridDim.x) {
    const int64_t image = tile / per_image, own = (tile - image * per_image) * kThreads + threadIdx.x;
    if (own >= pixels) continue;
    const Logits<kStorage, R, kCoarse> logits(t, image, static_cast<int>(own));
    constexpr int kUnroll = kCoarse ? 1 : 4;  // as above
    R best = logits(0);
    int label = 0;
#pragma unroll kUnroll
    for (int j = 1; j < t.classes; ++j) {
      const R x = logits(j);
      const bool better = x > best || (x != x && best == best);
      best = better ? x : best;
      label = better ? j : label;
    }
    const int64_t at = image * pixels + own;
    if (t.classes <= 256) {
      static_cast<uint8_t*>(t.label_map)[at] = static_cast<uint8_t>(label);
    } else {
      static_cast<int64_t*>(t.label_map)[at] = label;
    }
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

// f(Stored) for what the logits are stored as.
template <class R, class F>
Error with_storage(Storage storage, const F& f) {
  if constexpr (sizeof(R) == 8) return f(Stored<Storage::f64>{});
  switch (storage) {
    case Storage::bf16: return f(Stored<Storage::bf16>{});
    case Storage::f16: return f(Stored<Storage::f16>{});
    default: return f(Stored<Storage::f32>{});
  }
}

int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

template <class Kernel, class R>
Error over_pixels(Kernel kernel, const Trusted<R>& t, void* stream) {
  const int64_t tiles = (t.pixels() + kThreads - 1) / kThreads * t.batch;
  const int64_t most = at_most(resident_blocks(kernel, kThreads, 0), cuda::kSumRows / kWarps);
  return launch(kernel, at_most(tiles, most), kThreads, 0, stream, t);
}

int power_of_two_from(int64_t n, int most) {
  int power = 1;
  while (power < most && power < n) power *= 2;
  return power;
}

// About 16 pixels for each thread; neighbouring threads on neighbouring pixels.
template <class R>
Cells cells_of(const Trusted<R>& t) {
  Cells c{};
  const auto covered = [](int n, int by) { return (n + by - 1) / by; };
  const int64_t wide = covered(t.size[2], t.grid[2]), high = covered(t.size[1], t.grid[1]);
  const int lanes = power_of_two_from(wide * high / 16, kThreads);
  c.across = power_of_two_from(wide, lanes);
  c.down = lanes / c.across;
  c.slots = lanes <= kWarp ? 1 : lanes / kWarp;
  const int cells = kTileSums / c.slots, side = c.slots == 1 ? 16 : c.slots == 2 ? 11 : c.slots == 4 ? 8 : 5;
  const int high_most = t.grid[2] < side ? cells / t.grid[2] : side;
  c.height = t.grid[1] < high_most ? t.grid[1] : high_most;
  c.width = t.grid[2] < cells / c.height ? t.grid[2] : cells / c.height;
  c.rows = c.height == t.grid[1] ? c.height : c.height - 1;
  c.columns = c.width == t.grid[2] ? c.width : c.width - 1;
  c.tiles_y = covered(t.grid[1], c.rows);
  c.tiles_x = covered(t.grid[2], c.columns);
  c.chunks = c.chunk = 1;
  return c;
}

}  // namespace

namespace cuda {

template <class R>
Error trusted_pixels(const Trusted<R>& t, void* stream) {
  return with_storage<R>(t.storage, [&](auto stored) {
    constexpr Storage kStorage = decltype(stored)::value;
    if (t.on_pixels()) {
      return t.layers == 1 ? over_pixels(coarse::trusted_pixels<kStorage, R, false, 1>, t, stream)
                           : over_pixels(coarse::trusted_pixels<kStorage, R, false, kHeldLayers>, t, stream);
    }
    return t.layers == 1 ? over_pixels(coarse::trusted_pixels<kStorage, R, true, 1>, t, stream)
                         : over_pixels(coarse::trusted_pixels<kStorage, R, true, kHeldLayers>, t, stream);
  });
}

template <class R>
Error trusted_gather(const Trusted<R>& t, void* stream) {
  return with_storage<R>(t.storage, [&](auto stored) {
    constexpr Storage kStorage = decltype(stored)::value;
    Cells c = cells_of(t);
    const auto go = [&](auto kernel, int together) {
      const size_t sums = sizeof(R) * 4 * together * c.height * c.width * c.slots;
      const size_t bytes = sums + sizeof(int) * (c.height + c.width + 2);
      // A tile keeps to itself as many classes as leave every multiprocessor busy.
      const int64_t tiles = static_cast<int64_t>(c.tiles_y) * c.tiles_x * t.grid[0] * t.batch;
      const int64_t resident = resident_blocks(kernel, kThreads, bytes), chunks = 2 * resident / tiles + 1;
      c.chunk = static_cast<int>(((t.classes + chunks - 1) / chunks + together - 1) / together * together);
      c.chunks = (t.classes + c.chunk - 1) / c.chunk;
      return launch(kernel, at_most(tiles * c.chunks, resident), kThreads, bytes, stream, t, c);
    };
    const bool one = t.kind_count == 1 && t.layers == 1;
    if (!one) return go(coarse::trusted_gather<kStorage, R, false, 2>, 2);
    return t.classes > 2 ? go(coarse::trusted_gather<kStorage, R, true, 4>, 4)
                         : go(coarse::trusted_gather<kStorage, R, true, 2>, 2);
  });
}

// Slices of doubles, at most 64 MB of them.
template <class R>
int64_t trusted_slices(const Trusted<R>& t) {
  const int64_t words = (t.pixels() + kWarp - 1) / kWarp * t.batch;
  const int64_t slice = 8 * static_cast<int64_t>(t.classes) * t.classes, most = (int64_t{64} << 20) / slice;
  constexpr Storage kOwn = sizeof(R) == 8 ? Storage::f64 : Storage::f32;
  const int64_t resident = resident_blocks(coarse::trusted_transition<kOwn, R>, kThreads, 0);
  const int64_t blocks = at_most(at_most(words, resident), most);
  return blocks < 1 ? 1 : blocks;
}

template <class R>
Error trusted_transition(const Trusted<R>& t, int kind, int64_t slices, double* sums, void* stream) {
  int64_t first = 0;
  for (int k = 0; k < kind; ++k) first += t.kinds[k].layers;
  return with_storage<R>(t.storage, [&](auto stored) {
    constexpr Storage kStorage = decltype(stored)::value;
    return launch(coarse::trusted_transition<kStorage, R>, slices, kThreads, 0, stream, t, kind, first, sums);
  });
}

template <class R>
Error trusted_labels(const Trusted<R>& t, void* stream) {
  return with_storage<R>(t.storage, [&](auto stored) {
    constexpr Storage kStorage = decltype(stored)::value;
    return t.on_pixels() ? over_pixels(coarse::trusted_labels<kStorage, R, false>, t, stream)
                         : over_pixels(coarse::trusted_labels<kStorage, R, true>, t, stream);
  });
}

template Error trusted_pixels(const Trusted<float>&, void*);
template Error trusted_pixels(const Trusted<double>&, void*);
template Error trusted_gather(const Trusted<float>&, void*);
template Error trusted_gather(const Trusted<double>&, void*);
template int64_t trusted_slices(const Trusted<float>&);
template int64_t trusted_slices(const Trusted<double>&);
template Error trusted_transition(const Trusted<float>&, int, int64_t, double*, void*);
template Error trusted_transition(const Trusted<double>&, int, int64_t, double*, void*);
template Error trusted_labels(const Trusted<float>&, void*);
template Error trusted_labels(const Trusted<double>&, void*);

}  // namespace cuda
}  // namespace coarse
