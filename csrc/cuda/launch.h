// What the glue (ops_cuda.cpp) calls: every kernel of this folder behind a host function. Raw pointers and a stream,
// nothing of torch. Each returns null, or what went wrong; none waits for the device.
#pragma once

#include "single.h"

namespace coarse {
namespace cuda {

using Error = const char*;

// Which pixels a launch is about: `span` neighbouring ones of each of `images` images. The pointers of the Stream are
// those of the first of them (`part_of`), and its cm_logits are laid out as the region says: element (i, j) of pixel x
// of image b is cm_logits[b * cm_batch_stride + (i * C + j) * plane + x], and likewise the gradient with its own image
// stride.
struct PixelRegion {
  int64_t images = 0, span = 0;
  int64_t image_pixels = 0;  // from one plane of class logits, and from one image of labels, to the next
  int64_t plane = 0;
  int64_t gradient_batch_stride = 0;
  int64_t row_bytes = 0;  // from a[i, j] to a[i + 1, j]; filled in by the launch
};

// The stream as seen from pixel `begin` of image `image` on.
template <class R>
Stream<R> part_of(Stream<R> s, int64_t image, int64_t begin) {
  const auto bytes = [](Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; };
  const auto move = [](auto*& p, int64_t n) {
    if (p != nullptr) p += n;
  };
  const auto move_bytes = [](auto*& p, int64_t n) {
    if (p != nullptr) p = const_cast<char*>(static_cast<const char*>(p)) + n;
  };
  const int64_t at = image * s.pixels() + begin, seg = image * s.classes * s.pixels() + begin;
  move_bytes(s.labels, at * (s.label_type == LabelType::u8 ? 1 : 8));
  move(s.pixel_weight, at);
  move(s.nll_map, at);
  move(s.trace_map, at);
  move(s.loss_map, at);
  move_bytes(s.seg_logits, seg * bytes(s.seg_storage));
  move_bytes(s.seg_gradient, seg * bytes(s.seg_storage));
  move_bytes(s.posterior, seg * bytes(s.seg_storage));
  return s;
}

// The fast kernels leave the pixels whose evidence is too small for probabilities to a second launch, in log space, and
// mark them in Stream::small_mask, a word for 32 pixels: as many words as this.
inline int64_t mask_words(int64_t images, int64_t pixels) { return images * (pixels / 32 + 64); }

// Rows of Stream::sums, and slices of Stream::transition_gradient, that a kernel may use: zeroed by the caller, added
// to by one launch after the other.
constexpr int64_t kSumRows = 8192;
template <class R>
int64_t transition_slices(const Stream<R>& s);

// CM logits on the pixel grid: loss, gradients, posterior of a region. pixel_fast.h where there is a kernel for this C,
// else pixel_general.cu. A region has fewer than 2^31 pixels in an image.
template <class R>
Error pixel_grid(const Stream<R>& s, const PixelRegion& region, void* stream);

// The grid of the CM field, as Stream has the pixels: depth, height, width.
struct Grid {
  int64_t size[3];
  COARSE_HD int64_t points() const { return size[0] * size[1] * size[2]; }
};

// Any grid, a piece of an image at a time (field.cu): the logits of pixels [begin, end) of one image, interpolated to
// `out` (C * C, end - begin); and back, the gradient of those pixels summed onto the grid. cm_logits and gradient are
// the image's.
struct Piece {
  int64_t begin = 0, end = 0;
};
template <class R>
Error expand_field(const Stream<R>& s, const Grid& grid, const Piece& piece, R* out, void* stream);
template <class R>
Error gather_field(const Stream<R>& s, const Grid& grid, const Piece& piece, const R* pixels, R* gradient,
                   void* stream);

// A grid of cells (strided.cu), float only: null where it does not serve the stream, and the general way has to do.
struct StridedPlan {
  bool fits = false;
  int64_t copies = 1;      // of the gradient, to be added up
  int64_t mask_words = 0;  // of Stream::small_mask
};
StridedPlan plan_strided(const Stream<float>& s, const Grid& grid, bool want_gradient);
// cm_gradient: (copies, cm_batch, C, C, grid) float, zeros on arrival.
Error strided_grid(const Stream<float>& s, const Grid& grid, void* stream);

// --- small ones (reduce.cu) ------------------------------------------------------------------------------------------

// loss, nll, trace (0-d) from the rows that the kernels left, and the gradient of the transition (C, C) from its
// slices.
template <class R>
Error finish(const Stream<R>& s, R* loss, R* nll, R* trace, void* stream);
template <class R>
Error finish_transition(const Stream<R>& s, int64_t slices, R* gradient, void* stream);
// out[k] = sum over copies of in[copy * n + k], rounded to storage.
template <class R>
Error sum_copies(const R* in, int64_t copies, int64_t n, void* out, Storage storage, void* stream);
// p[k] *= *factor, where it is not 1.
template <class R>
Error scale(void* p, Storage storage, int64_t n, const R* factor, void* stream);
template <class R>
Error log_values(const R* in, R* out, int64_t n, void* stream);
// The sum of the weights of labelled pixels: `partial` holds kWeightRows doubles.
constexpr int kWeightRows = 1024;
template <class R>
Error label_weight(const Stream<R>& s, int64_t n, double* partial, double* sum, void* stream);
Error fill_zero(void* p, int64_t bytes, void* stream);

}  // namespace cuda
}  // namespace coarse
