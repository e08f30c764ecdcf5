#include "pixel_fast.h"

namespace coarse {
namespace cuda {

Error pixel_grid_f32(const Layer<float>& s, const PixelRegion& region, void* stream) {
  return pixel_grid_fast<Storage::f32>(s, region, stream);
}

}  // namespace cuda
}  // namespace coarse
