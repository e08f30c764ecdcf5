#include "pixel_fast.h"

namespace coarse {
namespace cuda {

Error pixel_grid_f16(const Layer<float>& s, const PixelRegion& region, void* stream) {
  return pixel_grid_fast<Storage::f16>(s, region, stream);
}

}  // namespace cuda
}  // namespace coarse
