// How a kernel is launched: on the device of the tensors, on torch's current stream, with errors that name the kernel.

#pragma once

#include "common.h"
#include "cuda/gpu.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#define AF_GPU_KEY CUDA
#else
#define AF_GPU_KEY CPU
#endif

namespace alignfast {

constexpr int64_t MAX_BLOCKS = (int64_t{1} << 31) - 1;

[[noreturn]] inline void refuse_launch(const char* kernel, int64_t blocks, int threads, const Tensor& first,
                                       const std::string& reason) {
  throw std::runtime_error(joined(kernel, ": launch of ", blocks, " blocks of ", threads, " threads for a tensor of ",
                                  shape_text(first), " failed: ", reason));
}

// While one lives, the device of `first` is the current one.
class Launcher {
 public:
  explicit Launcher(const Tensor& first)
      : first_(first)
#if defined(__CUDACC__)
        ,
        guard_(first.get_device_index()),
        stream_(torch::stable::accelerator::getCurrentStream(first.get_device_index()))
#endif
  {
  }

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    if (blocks > MAX_BLOCKS) refuse_launch(name, blocks, threads, first_, "a grid has at most 2^31 - 1 blocks");
#if defined(__CUDACC__)
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    const cudaError_t error = std::apply(
        [&](auto&... value) {
          void* addresses[] = {const_cast<void*>(static_cast<const void*>(&value))...};
          return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                  dim3(static_cast<unsigned>(threads)), addresses, 0,
                                  static_cast<cudaStream_t>(stream_.nativeHandle()));
        },
        values);
    if (error != cudaSuccess) {
      // Else the next call of anyone would report it.
      cudaGetLastError();
      const bool foreign = error == cudaErrorNoKernelImageForDevice;
      refuse_launch(name, blocks, threads, first_,
                    joined(cudaGetErrorString(error),
                           foreign ? "; this library has code for newer devices alone, ALIGNFAST_BACKEND=triton serves "
                                     "others"
                                   : ""));
    }
#else
    try {
      emulation::launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                        static_cast<Parameters>(arguments)...);
    } catch (const std::exception& error) {
      refuse_launch(name, blocks, threads, first_, error.what());
    }
#endif
  }

  int64_t multiprocessors() const {
#if defined(__CUDACC__)
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, first_.get_device_index());
    AF_CHECK(error == cudaSuccess, "device ", first_.get_device_index(), ": ", cudaGetErrorString(error));
    return count;
#else
    return 1;
#endif
  }

 private:
  const Tensor& first_;
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
#endif
};

inline Tensor empty_on(const Tensor& first, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::empty(shape, type, std::nullopt, first.device());
}

inline int64_t in_groups_of(int64_t size, int64_t count) { return (count + size - 1) / size; }

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace alignfast
