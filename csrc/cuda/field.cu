// Any grid, a piece of the image at a time: a field at a run of pixels, interpolated, and the gradient of those pixels
// gathered back. Between the two the pixel-grid kernels do their work on the piece, which is small enough to stay in
// the second-level cache. Serves CM logits where strided.cu does not (volumes, more than 20 classes, double, the
// gradient of the transition, one field on the pixel grid for several images), and the gradient of class logits on a
// grid of their own.
#include "device.h"
#include "launch.h"

namespace coarse {
namespace {

constexpr int kThreads = 256;

template <class R>
struct PixelTaps {
  Tap<R> axis[3];
};

template <class R>
__device__ PixelTaps<R> taps_of(const cuda::Piece& piece, const cuda::Grid& grid, int64_t x) {
  const int64_t row = x / piece.size[2];
  return {{linear_tap<R>(row / piece.size[1], grid.size[0], piece.size[0]),
           linear_tap<R>(row % piece.size[1], grid.size[1], piece.size[1]),
           linear_tap<R>(x % piece.size[2], grid.size[2], piece.size[2])}};
}

template <class R>
__device__ R lerp(const Tap<R>& tap, R a, R b) {
  return tap.i0 == tap.i1 ? a : (R(1) - tap.lambda) * a + tap.lambda * b;
}

// A thread is a pixel; blocks beyond those that the pixels take share the C x C planes.
template <class R>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const void* field, Storage storage, int64_t planes, cuda::Grid grid, cuda::Piece piece,
                  int64_t pixel_blocks, R* out) {
  const int64_t n = piece.end - piece.begin;
  const int64_t at = blockIdx.x % pixel_blocks * kThreads + threadIdx.x;
  if (at >= n) return;
  const PixelTaps<R> taps = taps_of<R>(piece, grid, piece.begin + at);
  const auto &z = taps.axis[0], &y = taps.axis[1], &x = taps.axis[2];
  const int64_t points = grid.points();
  for (int64_t plane = blockIdx.x / pixel_blocks; plane < planes; plane += gridDim.x / pixel_blocks) {
    const auto point = [&](int64_t gz, int64_t gy, int64_t gx) {
      return load_as<R>(field, storage, plane * points + (gz * grid.size[1] + gy) * grid.size[2] + gx);
    };
    const auto row = [&](int64_t gz, int64_t gy) { return lerp(x, point(gz, gy, x.i0), point(gz, gy, x.i1)); };
    const auto slice = [&](int64_t gz) { return lerp(y, row(gz, y.i0), row(gz, y.i1)); };
    out[plane * n + at] = lerp(z, slice(z.i0), slice(z.i1));
  }
}

// What grid point `point` gets of a pixel with this tap.
template <class R>
__device__ R share_of(const Tap<R>& tap, int64_t point) {
  if (tap.i0 == tap.i1) return tap.i0 == point ? R(1) : R(0);
  return tap.i0 == point ? R(1) - tap.lambda : tap.i1 == point ? tap.lambda : R(0);
}

// `lanes` lanes of a warp are one entry of the gradient: they sum over the pixels that read it, in the order of the
// image.
template <class R>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const R* pixels, int64_t planes, cuda::Grid grid, cuda::Piece piece, int64_t first_point,
                  int64_t near, int lanes, void* gradient, Storage storage, bool add) {
  const int64_t n = piece.end - piece.begin, points = grid.points(), entries = planes * near;
  const int lane = threadIdx.x % lanes;
  const int64_t first_entry = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads / lanes;
  // as many rounds for all lanes of a warp, which meet in shuffles
  for (int64_t round = 0; round < (entries + step - 1) / step; ++round) {
    const bool exists = first_entry + round * step < entries;
    const int64_t entry = exists ? first_entry + round * step : 0;
    const int64_t point = first_point + entry % near, plane = entry / near;
    const int64_t at[3] = {point / (grid.size[1] * grid.size[2]), point / grid.size[2] % grid.size[1],
                           point % grid.size[2]};
    int64_t first[3], last[3];  // the pixels that read it, along each axis
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t in = grid.size[axis], out = piece.size[axis];
      const bool own = in == out;  // every pixel reads its own point
      first[axis] = own ? at[axis] : at[axis] == 0 ? 0 : first_pixel<R>(at[axis] - 1, in, out);
      last[axis] = own ? at[axis] + 1 : at[axis] + 1 >= in ? out : first_pixel<R>(at[axis] + 1, in, out);
    }
    bool reached = false;
    R sum = 0;
    for (int64_t z = first[0]; z < last[0]; ++z) {
      const R share_z = share_of(linear_tap<R>(z, grid.size[0], piece.size[0]), at[0]);
      for (int64_t y = first[1]; y < last[1]; ++y) {
        const int64_t row = (z * piece.size[1] + y) * piece.size[2];
        const int64_t begin = row + first[2] > piece.begin ? row + first[2] : piece.begin;
        const int64_t end = row + last[2] < piece.end ? row + last[2] : piece.end;
        if (begin >= end) continue;
        reached = true;
        const R share_zy = share_z * share_of(linear_tap<R>(y, grid.size[1], piece.size[1]), at[1]);
        for (int64_t x = begin + lane; x < end; x += lanes) {
          const R share = share_zy * share_of(linear_tap<R>(x - row, grid.size[2], piece.size[2]), at[2]);
          sum += share * pixels[plane * n + (x - piece.begin)];
        }
      }
    }
    for (int of = lanes / 2; of > 0; of /= 2) sum += __shfl_xor_sync(kAllLanes, sum, of);
    if (exists && reached && lane == 0) put(gradient, storage, add, plane * points + point, sum);
  }
}

}  // namespace

namespace cuda {

template <class R>
Error expand_field(const void* field, Storage storage, int64_t planes, const Grid& grid, const Piece& piece, R* out,
                   void* stream) {
  const int64_t pixel_blocks = (piece.end - piece.begin + kThreads - 1) / kThreads;
  const int64_t wanted = (4 * resident_blocks(expand_kernel<R>, kThreads, 0) + pixel_blocks - 1) / pixel_blocks;
  const int64_t blocks = pixel_blocks * (wanted < planes ? wanted : planes);
  return launch(expand_kernel<R>, blocks, kThreads, 0, stream, field, storage, planes, grid, piece, pixel_blocks, out);
}

template <class R>
Error gather_field(const R* pixels, int64_t planes, const Grid& grid, const Piece& piece, void* gradient,
                   Storage storage, bool add, void* stream) {
  // The grid points that these pixels may read: along the outermost axis that has any extent, one more on either side
  // than needed, in case the host rounds the position in another way than the device.
  const int outer = piece.size[0] > 1 ? 0 : 1;
  const int64_t in = grid.size[outer], out = piece.size[outer];
  const int64_t row = piece.size[2] * (outer == 0 ? piece.size[1] : 1);
  const int64_t each = grid.size[2] * (outer == 0 ? grid.size[1] : 1);
  const int64_t low = linear_tap<R>(piece.begin / row, in, out).i0 - 1;
  const int64_t high = linear_tap<R>((piece.end - 1) / row, in, out).i1 + 2;
  const int64_t first = low < 0 ? 0 : low, near = ((high < in ? high : in) - first) * each;
  // as many lanes as an entry has pixels in a row, roughly
  int lanes = 1;
  while (lanes < kWarp && lanes * grid.size[2] < piece.size[2]) lanes *= 2;
  const int64_t wanted = (planes * near * lanes + kThreads - 1) / kThreads;
  const int64_t most = 4 * resident_blocks(gather_kernel<R>, kThreads, 0);
  return launch(gather_kernel<R>, wanted < most ? wanted : most, kThreads, 0, stream, pixels, planes, grid, piece,
                first * each, near, lanes, gradient, storage, add);
}

template Error expand_field(const void*, Storage, int64_t, const Grid&, const Piece&, float*, void*);
template Error expand_field(const void*, Storage, int64_t, const Grid&, const Piece&, double*, void*);
template Error gather_field(const float*, int64_t, const Grid&, const Piece&, void*, Storage, bool, void*);
template Error gather_field(const double*, int64_t, const Grid&, const Piece&, void*, Storage, bool, void*);

}  // namespace cuda
}  // namespace coarse
