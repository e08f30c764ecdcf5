// What a run (run.h) calls: every kernel of this folder behind a host function. Raw pointers and a stream, nothing of
// torch. Each returns null, or what went wrong; none waits for the device.
#pragma once

#include "layer.h"

namespace coarse {
namespace cuda {

using Error = const char*;

// Why a faster way does not serve a kind, in the order in which it is asked: backends/cuda.py puts them into words.
enum class Refusal : int {
  none,
  wide,        // float64
  classes,     // too many, or one
  learned,     // the gradient of the transition
  volume,      // three axes
  dense,       // cells of fewer than two pixels on an axis
  long_axis,   // of more than 2^24 pixels
  class_grid,  // the class logits have a grid of their own
  copies,      // large cells need too many copies of the gradient
  grid,        // the field is not on the pixel grid
  shared,      // one field on the pixel grid serves several images
  layers,      // several layers add to a gradient in 16 bits
};

// Which pixels a launch is about: `span` neighbouring ones, from `begin` on, of each of `images` images, from `image`
// on. Four pointers of the Layer belong to the region: cm_logits has element (i, j) of its pixel x of its image b at
// b * cm_batch_stride + (i * C + j) * plane + x, the gradient likewise with its own image stride, seg_logits class j at
// b * seg_image + j * seg_plane + x, and class_out likewise.
struct PixelRegion {
  int64_t image = 0, images = 0;
  int64_t begin = 0, span = 0;
  int64_t plane = 0;
  int64_t gradient_batch_stride = 0;
  int64_t row_bytes = 0;  // from a[i, j] to a[i + 1, j]; filled in by the launch
};

// The fast kernels leave the pixels whose evidence is too small for probabilities to a second launch, in log space, and
// mark them in Layer::small_mask, a word for 32 pixels: as many words as this.
inline int64_t mask_words(int64_t images, int64_t pixels) { return images * (pixels / 32 + 64); }

// Rows of Layer::sums, and slices of Layer::transition_gradient, that a kernel may use: zeroed by the caller, added
// to by one launch after the other.
constexpr int64_t kSumRows = 8192;
template <class R>
int64_t transition_slices(const Layer<R>& s);

// CM logits on the pixel grid: loss, gradients, posterior of a region. pixel_fast.h where that does not refuse, else
// pixel_general.cu. A region has fewer than 2^31 pixels in an image.
template <class R>
Refusal pixel_fast_refuses(const Layer<R>& s);
template <class R>
Error pixel_grid(const Layer<R>& s, const PixelRegion& region, void* stream);

// A grid beside the pixels: depth, height, width.
struct Grid {
  int64_t size[3];
  COARSE_HD int64_t points() const { return size[0] * size[1] * size[2]; }
};

// A field on any grid, a piece of an image at a time (field.cu): its values at pixels [begin, end) of one image,
// interpolated, to `out` (planes, end - begin); and back, what those pixels have for it, (planes, end - begin),
// gathered. The field is the image's, (planes, grid).
struct Piece {
  int64_t size[3];  // of the image, in pixels
  int64_t begin = 0, end = 0;
};
template <class R>
Error expand_field(const void* field, Storage storage, int64_t planes, const Grid& grid, const Piece& piece, R* out,
                   void* stream);
// Added to a gradient in R. Where every pixel is a grid point, written, rounded to storage.
template <class R>
Error gather_field(const R* pixels, int64_t planes, const Grid& grid, const Piece& piece, void* gradient,
                   Storage storage, bool add, void* stream);

// A grid of cells (strided.cu), float only. Where it refuses the layer the general way has to do.
struct StridedPlan {
  Refusal refusal = Refusal::none;
  int64_t copies = 1;        // of the field's gradient, to be added up
  int64_t mask_words = 0;    // of Layer::small_mask
  int64_t class_floats = 0;  // of Layer::class_tiles; 0 where the class logits are on the pixel grid
};
StridedPlan plan_strided(const Layer<float>& s, const Grid& grid, bool want_cm, bool want_seg);
// cm_gradient: (copies, cm_batch, C, C, grid) float, zeros before the first layer. class_gradient: of class logits on a
// grid of their own, (B, C, seg_grid) float, added to; null: not wanted.
Error strided_grid(const Layer<float>& s, const Grid& grid, float* class_gradient, void* stream);

// The posterior of several kinds and layers (posterior.cu): any logits, any number of classes. `log_transition` has an
// element for each kind, null where its transition is.
// `scratch`: as many numbers as posterior_scratch says; null where that is 0.
template <class R>
int64_t posterior_scratch(const Problem<R>& problem);
template <class R>
Error posterior_of_all(const Problem<R>& problem, const R* const* log_transition, R* scratch, void* stream);

// --- small ones (reduce.cu) ------------------------------------------------------------------------------------------

// loss (0-d) = sum over kinds of weight * losses[k]; losses[k] = scale * (sum w nll + trace_weight * sum w tr A), and
// its two terms, from the rows that the kernels left.
template <class R>
struct KindSums {
  const double* sums;  // (kSumRows, 2)
  const R* scale;      // null: 1
  double weight, trace_weight;
  R *loss, *nll, *trace;
};
template <class R>
struct AllSums {
  int kinds;
  R* loss;
  KindSums<R> of[kMaxKinds];
};
template <class R>
Error finish(const AllSums<R>& sums, void* stream);
// out[k] = sum over slices of in[slice * n + k].
template <class R>
Error sum_slices(const double* in, int64_t slices, int64_t n, R* out, void* stream);
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
Error label_weight(const Layer<R>& s, int64_t n, double* partial, double* sum, void* stream);
Error fill_zero(void* p, int64_t bytes, void* stream);

}  // namespace cuda
}  // namespace coarse
