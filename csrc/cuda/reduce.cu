// What is left to do around the kernels: sums of sums in fixed order, weights, conversions.
#include "device.h"
#include "launch.h"

namespace coarse {
namespace {

constexpr int kThreads = 1024;

// The sum of value(0) ... value(n - 1), in an order that depends on n alone. For one whole block; on thread 0.
template <class F>
__device__ double block_sum(int64_t n, const F& value) {
  double* const warps = reinterpret_cast<double*>(dynamic_shared());
  double sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) sum += value(k);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = warp_sum(warps[threadIdx.x % kWarp]);
  __syncthreads();
  return sum;
}
constexpr size_t kBlockSumBytes = kThreads / kWarp * sizeof(double);

template <class R>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ cuda::AllSums<R> all) {
  // a weight of 0 counts for nothing, even if the sum is inf
  const auto scaled = [](double weight, double sum) { return weight == 0 ? 0.0 : weight * sum; };
  double total = 0;
  for (int k = 0; k < all.kinds; ++k) {
    const cuda::KindSums<R>& kind = all.of[k];
    const double nll = block_sum(cuda::kSumRows, [&](int64_t row) { return kind.sums[2 * row]; });
    const double trace = block_sum(cuda::kSumRows, [&](int64_t row) { return kind.sums[2 * row + 1]; });
    const double factor = kind.scale != nullptr ? static_cast<double>(*kind.scale) : 1.0;
    const double loss = nll + kind.trace_weight * trace;
    total += scaled(factor * kind.weight, loss);
    if (threadIdx.x != 0) continue;
    *kind.loss = static_cast<R>(scaled(factor, loss));
    *kind.nll = static_cast<R>(scaled(factor, nll));
    *kind.trace = static_cast<R>(scaled(factor, trace));
  }
  if (threadIdx.x == 0) *all.loss = static_cast<R>(total);
}

constexpr int kSmallBlock = 256;
inline int64_t blocks_for(int64_t n) {
  const int64_t blocks = (n + kSmallBlock - 1) / kSmallBlock, most = int64_t{1} << 20;
  return blocks < most ? blocks : most;
}
__device__ __forceinline__ int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * kSmallBlock + threadIdx.x;
}
__device__ __forceinline__ int64_t index_step() { return static_cast<int64_t>(gridDim.x) * kSmallBlock; }

template <class R>
__global__ void __launch_bounds__(kSmallBlock)
    sum_slices_kernel(const double* slices, int64_t count, int64_t n, R* out) {
  for (int64_t k = first_index(); k < n; k += index_step()) {
    double sum = 0;
    for (int64_t slice = 0; slice < count; ++slice) sum += slices[slice * n + k];
    out[k] = static_cast<R>(sum);
  }
}

template <class R>
__global__ void __launch_bounds__(kSmallBlock)
    sum_copies_kernel(const R* in, int64_t copies, int64_t n, void* out, Storage storage) {
  for (int64_t k = first_index(); k < n; k += index_step()) {
    R sum = in[k];
    for (int64_t copy = 1; copy < copies; ++copy) sum += in[copy * n + k];
    store_as(out, storage, k, sum);
  }
}

template <class R>
__global__ void __launch_bounds__(kSmallBlock) scale_kernel(void* p, Storage storage, int64_t n, const R* factor) {
  const R f = *factor;
  if (f == R(1)) return;           // as after loss.backward(): nothing is read or written
  const bool nothing = f == R(0);  // of a transition the gradient may be inf, which times 0 is NaN
  for (int64_t k = first_index(); k < n; k += index_step())
    store_as(p, storage, k, nothing ? R(0) : f * load_as<R>(p, storage, k));
}

template <class R>
__global__ void __launch_bounds__(kSmallBlock) log_kernel(const R* in, R* out, int64_t n) {
  // the library's own logarithm: a transition may hold subnormals
  for (int64_t k = first_index(); k < n; k += index_step()) out[k] = log(in[k]);
}

template <class R>
__global__ void __launch_bounds__(kThreads) weigh_kernel(Layer<R> s, int64_t n, double* partial) {
  const int64_t share = (n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int64_t count = n - begin < share ? n - begin : share;
  const double sum = block_sum(count, [&](int64_t k) {
    const int label = label_at(s, begin + k);
    return label < 0 ? 0.0 : static_cast<double>(weight_at(s, label, begin + k));
  });
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class R>  // one kernel; the template keeps it out of translation units that do not launch it
__global__ void __launch_bounds__(kThreads) add_up_kernel(const R* values, int64_t n, R* out) {
  const double sum = block_sum(n, [&](int64_t k) { return static_cast<double>(values[k]); });
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace

namespace cuda {

template <class R>
Error finish(const AllSums<R>& sums, void* stream) {
  return launch(finish_kernel<R>, 1, kThreads, kBlockSumBytes, stream, sums);
}

template <class R>
Error sum_slices(const double* in, int64_t slices, int64_t n, R* out, void* stream) {
  return launch(sum_slices_kernel<R>, blocks_for(n), kSmallBlock, 0, stream, in, slices, n, out);
}

template <class R>
Error sum_copies(const R* in, int64_t copies, int64_t n, void* out, Storage storage, void* stream) {
  return launch(sum_copies_kernel<R>, blocks_for(n), kSmallBlock, 0, stream, in, copies, n, out, storage);
}

template <class R>
Error scale(void* p, Storage storage, int64_t n, const R* factor, void* stream) {
  const int64_t wanted = blocks_for(n), most = 4 * resident_blocks(scale_kernel<R>, kSmallBlock, 0);
  return launch(scale_kernel<R>, wanted < most ? wanted : most, kSmallBlock, 0, stream, p, storage, n, factor);
}

template <class R>
Error log_values(const R* in, R* out, int64_t n, void* stream) {
  return launch(log_kernel<R>, blocks_for(n), kSmallBlock, 0, stream, in, out, n);
}

template <class R>
Error label_weight(const Layer<R>& s, int64_t n, double* partial, double* sum, void* stream) {
  const int64_t wanted = (n + 4 * kThreads - 1) / (4 * kThreads);
  const int64_t blocks = wanted < 1 ? 1 : wanted < kWeightRows ? wanted : kWeightRows;
  if (Error error = launch(weigh_kernel<R>, blocks, kThreads, kBlockSumBytes, stream, s, n, partial)) return error;
  return launch(add_up_kernel<double>, 1, kThreads, kBlockSumBytes, stream, static_cast<const double*>(partial), blocks,
                sum);
}

Error fill_zero(void* p, int64_t bytes, void* stream) {
  if (bytes == 0) return nullptr;
#if defined(__CUDACC__)
  return text(cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
#else
  std::memset(p, 0, static_cast<size_t>(bytes));
  return nullptr;
#endif
}

template Error finish(const AllSums<float>&, void*);
template Error finish(const AllSums<double>&, void*);
template Error sum_slices(const double*, int64_t, int64_t, float*, void*);
template Error sum_slices(const double*, int64_t, int64_t, double*, void*);
template Error sum_copies(const float*, int64_t, int64_t, void*, Storage, void*);
template Error sum_copies(const double*, int64_t, int64_t, void*, Storage, void*);
template Error scale(void*, Storage, int64_t, const float*, void*);
template Error scale(void*, Storage, int64_t, const double*, void*);
template Error log_values(const float*, float*, int64_t, void*);
template Error log_values(const double*, double*, int64_t, void*);
template Error label_weight(const Layer<float>&, int64_t, double*, double*, void*);
template Error label_weight(const Layer<double>&, int64_t, double*, double*, void*);

}  // namespace cuda
}  // namespace coarse
