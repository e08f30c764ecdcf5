// A grid of cells, and the tiles that its pixels are cut into: what the strided kernels share.
#pragma once

#include "device.h"

namespace coarse {
namespace {

constexpr int kRows = 8;  // of a tile

// One axis of the grid in cells: cell c reads points c and c + 1. Half cells -1 and `grid` - 1 are those of pixels
// clamped to the first and the last point; an axis of one point is one cell.
struct CellAxis {
  int64_t grid, pixels;
  int64_t first, cells;  // cell numbers first .. first + cells - 1

  __host__ __device__ __forceinline__ int64_t begin(int64_t cell) const {
    return grid == 1 || cell < 0 ? 0 : first_pixel<float>(cell, grid, pixels);
  }
  __host__ __device__ __forceinline__ int64_t end(int64_t cell) const {
    return grid == 1 || cell + 1 >= grid ? pixels : first_pixel<float>(cell + 1, grid, pixels);
  }
  // The weight of point c + 1. Of the half cells: all to the only point that there is.
  __device__ __forceinline__ float lambda(int64_t cell, int64_t pixel) const {
    if (grid == 1 || cell + 1 >= grid) return 0.0f;
    if (cell < 0) return 1.0f;
    const float lambda = grid_position<float>(pixel, grid, pixels) - static_cast<float>(cell);
    return lambda < 0.0f ? 0.0f : lambda > 1.0f ? 1.0f : lambda;
  }
  __device__ __forceinline__ int64_t clamp(int64_t point) const {
    return point < 0 ? 0 : point < grid ? point : grid - 1;
  }
  // The cell that a pixel is in.
  __device__ __forceinline__ int64_t cell_of(int64_t pixel) const {
    if (grid == 1) return 0;
    int64_t cell = static_cast<int64_t>(grid_position<float>(pixel, grid, pixels) + 1.0f) - 1;
    cell = cell < -1 ? -1 : cell < grid ? cell : grid - 1;
    while (begin(cell) > pixel) --cell;
    while (end(cell) <= pixel) ++cell;
    return cell;
  }
};

struct Tiling {
  CellAxis y, x;
  int lanes;                 // of a cell: 4, 8, 16 or 32
  int64_t bands, splits;     // parts of a cell that have tiles of their own: kRows high, `lanes` wide
  int64_t tiles_y, tiles_x;  // rows of cells, runs of 32 / lanes cells
  // This launch: tiles of one colour (every step_y-th row of cells from colour_y on) of images [image, image + images)
  int64_t colour_y, step_y, colour_x, step_x;
  int64_t image, images;
  int64_t columns, tiles_per_image;
  // The gradient: parts of a cell, and images of one field, that run at the same time have a copy each.
  int64_t copy_stride, copies_per_image, image_stride;
  // Points of the class logits' own grid that a tile may read.
  int class_rows, class_columns;

  __host__ __device__ __forceinline__ int64_t all_tiles() const { return tiles_y * bands * tiles_x * splits; }
  __host__ __device__ __forceinline__ int64_t class_points() const {
    return static_cast<int64_t>(class_rows) * class_columns;
  }
  __device__ __forceinline__ int64_t cells_per_tile() const { return kWarp / lanes; }
  // Where Layer::class_tiles has what a tile gives to class j. Rows and runs of cells are counted from 0.
  __device__ __forceinline__ int64_t class_tile(int64_t image_in_launch, int64_t row, int64_t band, int64_t run,
                                                int64_t split, int classes, int j) const {
    const int64_t tile = ((row * bands + band) * tiles_x + run) * splits + split;
    return ((image_in_launch * all_tiles() + tile) * classes + j) * class_points();
  }
};

// The points between which a pixel lies, on one axis of the class logits' own grid.
struct ClassTap {
  int first;
  float lambda;  // the weight of the next one

  __device__ __forceinline__ ClassTap(int64_t pixel, int grid, int64_t pixels) {
    const Tap<float> tap = linear_tap<float>(pixel, grid, pixels);
    first = static_cast<int>(tap.i0);
    lambda = tap.i1 == tap.i0 ? 0.0f : tap.lambda;
  }
};

constexpr int kClassRows = kRows, kClassColumns = kWarp;  // at most; `plan_strided` sees to it

// How a tile meets class logits on a grid of their own. In shared memory, the same for all warps.
struct ClassTile {
  int y0, x0;      // the first point
  int64_t at;      // Tiling::class_tile of class 0
  int row[kRows];  // of each row of pixels: the point above, from y0
  float below[kRows];
  int column[kWarp];  // of each lane: the point on its left, from x0
  float right[kWarp];
  int begin[kClassColumns], end[kClassColumns];  // lanes that read a column of points

  __device__ __forceinline__ float share_y(int r, int point) const {
    return row[r] == point ? 1.0f - below[r] : row[r] + 1 == point ? below[r] : 0.0f;
  }
  __device__ __forceinline__ float share_x(int lane, int point) const {
    return column[lane] == point ? 1.0f - right[lane] : column[lane] + 1 == point ? right[lane] : 0.0f;
  }
};

// Adds what each lane has for the grid points above and below to the left and right points of its cell. All lanes call.
struct CornerSum {
  int lanes, slot, within;  // of a cell; which cell; which lane of it
  bool right;               // this lane ends up with the right-hand point
  bool writes;
  int64_t at;  // of the grid point in a plane
  float lambda;

  __device__ __forceinline__ void add(float* plane, float upper, float lower) const {
    // kinds: bit 0 right, bit 1 lower. Each step halves the kinds or the lanes.
    const float give_right = lambda * upper, give_right_lower = lambda * lower;
    const float left = upper - give_right, left_lower = lower - give_right_lower;
    const bool odd = (within & 1) != 0, low = (within & 2) != 0;
    float top = odd ? give_right : left, bottom = odd ? give_right_lower : left_lower;
    top += __shfl_xor_sync(kAllLanes, odd ? left : give_right, 1);
    bottom += __shfl_xor_sync(kAllLanes, odd ? left_lower : give_right_lower, 1);
    float sum = low ? bottom : top;
    sum += __shfl_xor_sync(kAllLanes, low ? top : bottom, 2);
    for (int step = 4; step < lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    // The right-hand point of a cell is the left-hand one of the next.
    const float before = __shfl_sync(kAllLanes, sum, static_cast<int>(threadIdx.x) - lanes + 1);
    if (slot > 0 && !right) sum += before;
    if (writes) atomicAdd(plane + at, sum);  // the only add to this address in this launch
  }
};

// Where a lane of a tile works: column x of rows y0 .. y0 + rows - 1. It is the same for all warps of a block, so one
// of them finds out.
struct StridedPlace {
  int rows = 0;  // 0: nothing here, alike for the whole block
  bool inside = false;
  int left = 0, right = 0;                    // columns of grid points
  float lambda_x = 0, lambda0 = 0, step = 0;  // lambda of row r is lambda0 + r * step
  int64_t upper = 0, lower = 0;               // rows of grid points: offsets into a plane
  int64_t image = 0, pixel = 0;               // the first row's
  int64_t field = 0;                          // this image's CM logits
  int64_t gradient = 0;                       // and where their gradient is gathered
  int64_t cell_y = 0, y0 = 0;
  // The lanes of a warp read theirs side by side from shared memory: an odd number of words of 8 bytes, or
  // all 32 would be in one bank.
  int64_t padding = 0;
  CornerSum corners{};

  StridedPlace() = default;
  // `of_class`: to be filled in where the class logits have a grid of their own. A whole warp calls.
  __device__ StridedPlace(const Layer<float>& s, const Tiling& t, int64_t tile, ClassTile& of_class) {
    const int lane = threadIdx.x % kWarp, cells_per_tile = kWarp / t.lanes;
    image = t.image + tile / t.tiles_per_image;
    const int64_t k = tile % t.tiles_per_image;
    const int64_t column = k % t.columns, band = k / t.columns % t.bands, split = column % t.splits;
    const int64_t row_of_cells = t.colour_y + k / t.columns / t.bands * t.step_y;
    cell_y = t.y.first + row_of_cells;
    y0 = t.y.begin(cell_y) + band * kRows;
    const int64_t left_over = t.y.end(cell_y) - y0;
    rows = left_over < 0 ? 0 : left_over < kRows ? static_cast<int>(left_over) : kRows;
    if (rows == 0) return;
    const int slot = lane / t.lanes, within = lane % t.lanes;
    const int64_t run = t.colour_x + column / t.splits * t.step_x, cell_x = t.x.first + run * cells_per_tile + slot;
    const bool exists = cell_x < t.x.first + t.x.cells;
    const int64_t x = exists ? t.x.begin(cell_x) + split * t.lanes + within : 0;
    inside = exists && x < t.x.end(cell_x);
    left = static_cast<int>(t.x.clamp(cell_x));
    right = static_cast<int>(t.x.clamp(cell_x + 1));
    upper = t.y.clamp(cell_y) * t.x.grid;
    lower = t.y.clamp(cell_y + 1) * t.x.grid;
    lambda_x = inside ? t.x.lambda(cell_x, x) : 0.0f;
    lambda0 = t.y.lambda(cell_y, y0);
    // from end to end, so that its rounding error is not multiplied
    step = rows > 1 ? (t.y.lambda(cell_y, y0 + rows - 1) - lambda0) / static_cast<float>(rows - 1) : 0.0f;
    pixel = y0 * s.width + x;
    field = s.cm_batch == 1 ? 0 : image * s.cm_batch_stride;
    gradient =
        (band * t.splits + split + (image - t.image) * t.copies_per_image) * t.copy_stride + image * t.image_stride;

    // lanes 0 and 2 of a cell end up with its left-hand points, 1 and 3 with the right-hand ones
    corners.lanes = t.lanes;
    corners.slot = slot;
    corners.within = within;
    corners.right = (within & 1) != 0;
    const int64_t own_x = cell_x + corners.right, own_y = cell_y + ((within & 2) != 0);
    const bool last = slot == cells_per_tile - 1 || cell_x + 1 >= t.x.first + t.x.cells;
    corners.writes = exists && within < 4 && (!corners.right || last) && own_x >= 0 && own_x < t.x.grid && own_y >= 0 &&
                     own_y < t.y.grid;
    corners.at = own_y * t.x.grid + own_x;
    corners.lambda = lambda_x;

    if (s.seg_on_pixels) return;
    // a lane without a pixel takes the one before: columns have to ascend
    int64_t near = exists ? t.x.begin(cell_x) + split * t.lanes + within : s.width - 1;
    if (exists && near >= t.x.end(cell_x)) near = t.x.end(cell_x) - 1;
    const ClassTap across(near, s.seg_grid[2], s.width), first_down(y0, s.seg_grid[1], s.height);
    const int first_across = __shfl_sync(kAllLanes, across.first, 0);
    of_class.column[lane] = across.first - first_across;
    of_class.right[lane] = across.lambda;
    if (lane < kRows) {
      const ClassTap down(lane < rows ? y0 + lane : y0, s.seg_grid[1], s.height);
      of_class.row[lane] = down.first - first_down.first;
      of_class.below[lane] = down.lambda;
    }
    if (lane == 0) {
      of_class.y0 = first_down.first;
      of_class.x0 = first_across;
      of_class.at = t.class_tile(image - t.image, row_of_cells, band, run, split, s.classes, 0);
    }
    if (s.class_tiles == nullptr) return;
    for (int point = 0; point < t.class_columns; ++point) {
      const unsigned before = __ballot_sync(kAllLanes, of_class.column[lane] < point - 1);
      const unsigned up_to = __ballot_sync(kAllLanes, of_class.column[lane] <= point);
      if (lane == point) {
        of_class.begin[point] = __popc(before);
        of_class.end[point] = __popc(up_to);
      }
    }
  }

  // In labels, weights and maps; in what is written for each class.
  __device__ __forceinline__ int64_t map(const Layer<float>& s, int r) const {
    return map_at(s, image, pixel + r * s.width);
  }
  __device__ __forceinline__ int64_t of_class(const Layer<float>& s, int j, int r) const {
    return image * s.class_image + j * s.class_plane + pixel + r * s.width;
  }

  __device__ __forceinline__ float along_x(const Layer<float>& s, int64_t row) const {
    const float a = load_as<float>(s.cm_logits, s.cm_storage, row + left);
    if (left == right) return a;
    return (1.0f - lambda_x) * a + lambda_x * load_as<float>(s.cm_logits, s.cm_storage, row + right);
  }
};

static_assert(sizeof(StridedPlace) / 8 % 2 == 1, "bank conflicts");

}  // namespace
}  // namespace coarse
