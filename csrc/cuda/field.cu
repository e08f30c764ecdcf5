// Any grid of CM logits, a piece of the image at a time: the logits of a run of pixels, interpolated, and the gradient
// of those pixels gathered back. Between the two the pixel-grid kernels do their work on the piece, which is small
// enough to stay in the second-level cache. Serves what strided.cu does not: volumes, more than 21 classes, double, the
// gradient of the transition, and one field on the pixel grid for several images.
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
__device__ PixelTaps<R> taps_of(const Stream<R>& s, const cuda::Grid& grid, int64_t x) {
  const int64_t row = x / s.width;
  return {{linear_tap<R>(row / s.height, grid.size[0], s.depth), linear_tap<R>(row % s.height, grid.size[1], s.height),
           linear_tap<R>(x % s.width, grid.size[2], s.width)}};
}

template <class R>
__device__ R lerp(const Tap<R>& tap, R a, R b) {
  return tap.i0 == tap.i1 ? a : (R(1) - tap.lambda) * a + tap.lambda * b;
}

// A thread is a pixel; blocks beyond those that the pixels take share the C x C planes.
template <class R>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(Stream<R> s, cuda::Grid grid, cuda::Piece piece, int64_t pixel_blocks, R* out) {
  const int64_t n = piece.end - piece.begin, planes = static_cast<int64_t>(s.classes) * s.classes;
  const int64_t at = blockIdx.x % pixel_blocks * kThreads + threadIdx.x;
  if (at >= n) return;
  const PixelTaps<R> taps = taps_of(s, grid, piece.begin + at);
  const auto &z = taps.axis[0], &y = taps.axis[1], &x = taps.axis[2];
  const int64_t points = grid.points();
  for (int64_t plane = blockIdx.x / pixel_blocks; plane < planes; plane += gridDim.x / pixel_blocks) {
    const auto point = [&](int64_t gz, int64_t gy, int64_t gx) {
      return load_as<R>(s.cm_logits, s.cm_storage, plane * points + (gz * grid.size[1] + gy) * grid.size[2] + gx);
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

// A warp is one entry of the gradient: it sums over the pixels that read it, in the order of the image.
template <class R>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Stream<R> s, cuda::Grid grid, cuda::Piece piece, int64_t first_point, int64_t near, const R* pixels,
                  R* gradient) {
  const int64_t n = piece.end - piece.begin, points = grid.points();
  const int64_t entries = static_cast<int64_t>(s.classes) * s.classes * near;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kThreads / kWarp;
  const int64_t size[3] = {s.depth, s.height, s.width};
  for (int64_t entry = warp; entry < entries; entry += warps) {
    const int64_t point = first_point + entry % near, plane = entry / near;
    const int64_t at[3] = {point / (grid.size[1] * grid.size[2]), point / grid.size[2] % grid.size[1],
                           point % grid.size[2]};
    int64_t first[3], last[3];  // the pixels that read it, along each axis
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t in = grid.size[axis], out = size[axis];
      const bool own = in == out;  // every pixel reads its own point
      first[axis] = own ? at[axis] : at[axis] == 0 ? 0 : first_pixel<R>(at[axis] - 1, in, out);
      last[axis] = own ? at[axis] + 1 : at[axis] + 1 >= in ? out : first_pixel<R>(at[axis] + 1, in, out);
    }
    R sum = 0;
    for (int64_t z = first[0]; z < last[0]; ++z) {
      const R share_z = share_of(linear_tap<R>(z, grid.size[0], size[0]), at[0]);
      for (int64_t y = first[1]; y < last[1]; ++y) {
        const int64_t row = (z * s.height + y) * s.width;
        const int64_t begin = row + first[2] > piece.begin ? row + first[2] : piece.begin;
        const int64_t end = row + last[2] < piece.end ? row + last[2] : piece.end;
        if (begin >= end) continue;
        const R share_zy = share_z * share_of(linear_tap<R>(y, grid.size[1], size[1]), at[1]);
        for (int64_t x = begin + lane; x < end; x += kWarp) {
          const R share = share_zy * share_of(linear_tap<R>(x - row, grid.size[2], size[2]), at[2]);
          sum += share * pixels[plane * n + (x - piece.begin)];
        }
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) gradient[plane * points + point] += sum;
  }
}

}  // namespace

namespace cuda {

template <class R>
Error expand_field(const Stream<R>& s, const Grid& grid, const Piece& piece, R* out, void* stream) {
  const int64_t pixel_blocks = (piece.end - piece.begin + kThreads - 1) / kThreads;
  const int64_t planes = static_cast<int64_t>(s.classes) * s.classes;
  const int64_t wanted = (4 * resident_blocks(expand_kernel<R>, kThreads, 0) + pixel_blocks - 1) / pixel_blocks;
  const int64_t blocks = pixel_blocks * (wanted < planes ? wanted : planes);
  return launch(expand_kernel<R>, blocks, kThreads, 0, stream, s, grid, piece, pixel_blocks, out);
}

template <class R>
Error gather_field(const Stream<R>& s, const Grid& grid, const Piece& piece, const R* pixels, R* gradient,
                   void* stream) {
  constexpr int64_t kWarps = kThreads / kWarp;
  // The grid points that these pixels may read: along the outermost axis that has any extent, one more on either side
  // than needed, in case the host rounds the position in another way than the device.
  const bool volume = s.depth > 1;
  const int64_t in = grid.size[volume ? 0 : 1], out = volume ? s.depth : s.height;
  const int64_t row = volume ? s.height * s.width : s.width, each = grid.points() / (volume ? in : grid.size[0] * in);
  const int64_t low = linear_tap<R>(piece.begin / row, in, out).i0 - 1;
  const int64_t high = linear_tap<R>((piece.end - 1) / row, in, out).i1 + 2;
  const int64_t first = low < 0 ? 0 : low, near = ((high < in ? high : in) - first) * each;
  const int64_t entries = static_cast<int64_t>(s.classes) * s.classes * near;
  const int64_t wanted = (entries + kWarps - 1) / kWarps, most = 4 * resident_blocks(gather_kernel<R>, kThreads, 0);
  return launch(gather_kernel<R>, wanted < most ? wanted : most, kThreads, 0, stream, s, grid, piece, first * each,
                near, pixels, gradient);
}

template Error expand_field(const Stream<float>&, const Grid&, const Piece&, float*, void*);
template Error expand_field(const Stream<double>&, const Grid&, const Piece&, double*, void*);
template Error gather_field(const Stream<float>&, const Grid&, const Piece&, const float*, float*, void*);
template Error gather_field(const Stream<double>&, const Grid&, const Piece&, const double*, double*, void*);

}  // namespace cuda
}  // namespace coarse
