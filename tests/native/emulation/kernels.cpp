// Small kernels, sound and faulty, by which the emulation is tested: as a library that Python calls, and as a program
// of which AddressSanitizer tells the faults.

#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cuda_emulation.h"

namespace {

constexpr unsigned WHOLE = 0xffffffffu;

struct Arguments {
  const void* in;
  void* out;
  int count;

  template <class T>
  const T* read() const {
    return static_cast<const T*>(in);
  }
  template <class T>
  T* write() const {
    return static_cast<T*>(out);
  }
};

__device__ unsigned thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ unsigned block_number() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
__device__ unsigned block_size() { return blockDim.x * blockDim.y * blockDim.z; }

// Sums of 256 neighbours, for blocks of 256 threads.
__global__ void __launch_bounds__(256) block_sum(Arguments arguments) {
  AF_SHARED(float, warps, 8);
  float value = arguments.read<float>()[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = warpSize / 2; step > 0; step /= 2) value += __shfl_down_sync(WHOLE, value, step);
  if (threadIdx.x % warpSize == 0) warps[threadIdx.x / warpSize] = value;
  __syncthreads();
  if (threadIdx.x >= 8) return;
  value = warps[threadIdx.x];
  for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(0xffu, value, step, 8);
  if (threadIdx.x == 0) arguments.write<float>()[blockIdx.x] = value;
}

__global__ void indices(Arguments arguments) {
  unsigned* out = arguments.write<unsigned>() + 12 * (block_number() * block_size() + thread_number());
  const unsigned found[] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                            blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  for (int i = 0; i < 12; ++i) out[i] = found[i];
}

// The numbers 0 .. 31 of the lanes through every shuffle, by `count` and in parts of every width.
template <class T>
__device__ void shuffle(Arguments arguments) {
  const T lane = static_cast<T>(threadIdx.x) - static_cast<T>(7);
  T* out = arguments.write<T>();
  for (int width = 1; width <= warpSize; width *= 2, out += 4 * warpSize) {
    out[threadIdx.x] = __shfl_sync(WHOLE, lane, arguments.count, width);
    out[threadIdx.x + warpSize] = __shfl_up_sync(WHOLE, lane, arguments.count, width);
    out[threadIdx.x + 2 * warpSize] = __shfl_down_sync(WHOLE, lane, arguments.count, width);
    out[threadIdx.x + 3 * warpSize] = __shfl_xor_sync(WHOLE, lane, arguments.count, width);
  }
}
__global__ void shuffle_int(Arguments arguments) { shuffle<int>(arguments); }
__global__ void shuffle_float(Arguments arguments) { shuffle<float>(arguments); }
__global__ void shuffle_double(Arguments arguments) { shuffle<double>(arguments); }
__global__ void shuffle_long(Arguments arguments) { shuffle<long long>(arguments); }

// The halves of a warp vote by themselves, each as often as its lanes say.
__global__ void votes(Arguments arguments) {
  const int vote = arguments.read<int>()[threadIdx.x];
  int* out = arguments.write<int>() + 6 * threadIdx.x;
  const unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  out[0] = static_cast<int>(__ballot_sync(mask, vote));
  if (threadIdx.x < 16) {
    for (int i = 0; i < 3; ++i) __syncwarp(mask);
  }
  out[1] = __any_sync(mask, vote);
  out[2] = __all_sync(mask, vote);
  out[3] = __syncthreads_count(vote);
  out[4] = __syncthreads_or(vote);
  out[5] = __syncthreads_and(vote);
}

__global__ void atomics(Arguments arguments) {
  unsigned long long* out = arguments.write<unsigned long long>();
  const int number = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(reinterpret_cast<int*>(out), -number);
  atomicAdd(reinterpret_cast<unsigned*>(out + 1), static_cast<unsigned>(number));
  atomicAdd(out + 2, static_cast<unsigned long long>(number) << 32);
  atomicAdd(reinterpret_cast<float*>(out + 3), 0.5f);
  atomicAdd(reinterpret_cast<double*>(out + 4), 0.25);
  atomicMin(reinterpret_cast<int*>(out + 5), 3 - number);
  atomicMax(reinterpret_cast<unsigned*>(out + 6), static_cast<unsigned>(number));
  atomicMax(out + 7, static_cast<unsigned long long>(number) << 40);
  // Everyone has had the number of someone else; the last one's stays.
  atomicAdd(out + 9, atomicExch(out + 8, static_cast<unsigned long long>(number) + 1));
  // Counts up by one in every thread.
  unsigned seen = *reinterpret_cast<unsigned*>(out + 10), before;
  do {
    before = seen;
    seen = atomicCAS(reinterpret_cast<unsigned*>(out + 10), before, before + 1);
  } while (seen != before);
}

__global__ void widen_halves(Arguments arguments) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned short bits = arguments.read<unsigned short>()[i];
  arguments.write<float2>()[i] =
      make_float2(__half2float(__ushort_as_half(bits)), __bfloat162float(__ushort_as_bfloat16(bits)));
}

__global__ void narrow_to_halves(Arguments arguments) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= arguments.count) return;
  const float x = arguments.read<float>()[i];
  arguments.write<unsigned short>()[2 * i] = __half_as_ushort(__float2half_rn(x));
  arguments.write<unsigned short>()[2 * i + 1] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__global__ void arithmetic(Arguments arguments) {
  double* out = arguments.write<double>();
  const double found[] = {min(-1.0f, NAN),
                          max(NAN, 2.0),
                          static_cast<double>(min(-1, 1u)),
                          static_cast<double>(max(-3LL, 4LL)),
                          static_cast<double>(__umulhi(0xffffffffu, 0xfffffffeu)),
                          exp2f(-3),
                          __fdividef(3, 4),
                          __ldg(arguments.read<float>())};
  for (double value : found) *out++ = value;
}

__global__ void uninitialised(Arguments arguments) {
  AF_SHARED(float, values, 32);
  // The block before this has left something.
  arguments.write<float>()[blockIdx.x * warpSize + threadIdx.x] = values[threadIdx.x];
  __syncwarp();
  values[threadIdx.x] = 1;
}

__global__ void reverse(Arguments arguments) {
  AF_SHARED(int, values, 64);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  arguments.write<int>()[threadIdx.x] = values[63 - threadIdx.x];
}

// The same without a barrier.
__global__ void racing_reverse(Arguments arguments) {
  AF_SHARED(int, values, 64);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  arguments.write<int>()[threadIdx.x] = values[63 - threadIdx.x];
}

// Two rounds through the same memory, with a barrier between writing and reading but none before the next writing.
__global__ void racing_rounds(Arguments arguments) {
  AF_SHARED(int, values, 64);
  int found = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 2; ++i) {
    values[threadIdx.x] = found + 1;
    __syncthreads();
    found = values[63 - threadIdx.x];
  }
  arguments.write<int>()[threadIdx.x] = found;
}

// The last block to write wins.
__global__ void racing_blocks(Arguments arguments) { *arguments.write<int>() = static_cast<int>(blockIdx.x); }

int living = 0;

struct Living {
  Living() : memory(100) { ++living; }
  ~Living() { --living; }
  std::vector<int> memory;
};

__global__ void ended_before_barrier(Arguments) {
  const Living here;
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void two_barriers(Arguments) {
  const Living here;
  if (threadIdx.x < 33) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_outside_its_mask(Arguments) {
  const Living here;
  __ballot_sync(0xfffffffeu, 1);
}

__global__ void ended_before_shuffle(Arguments arguments) {
  const Living here;
  if (threadIdx.x == 35) return;
  arguments.write<float>()[threadIdx.x] = __shfl_xor_sync(WHOLE, 1.0f, 1);
}

__global__ void shuffle_in_two_places(Arguments) {
  const Living here;
  if (threadIdx.x % 2) {
    __shfl_xor_sync(WHOLE, 1.0f, 1);
  } else {
    __shfl_xor_sync(WHOLE, 1.0f, 1);
  }
}

__global__ void reads_beyond_its_mask(Arguments) {
  if (threadIdx.x < 16) __shfl_down_sync(0xffffu, threadIdx.x, 8);
}

__global__ void odd_width(Arguments) { __shfl_sync(WHOLE, threadIdx.x, 0, 12); }

__global__ void too_much_shared(Arguments) {
  const Living here;
  AF_SHARED(double, half, 24 << 7);
  AF_SHARED(float, rest, (24 << 8) + 1);
  half[0] = rest[0];
}

__global__ void as_much_shared_as_there_is(Arguments arguments) {
  AF_SHARED(double, half, 24 << 7);
  AF_SHARED(float, rest, 24 << 8);
  half[threadIdx.x] = rest[threadIdx.x] = 1;
  *arguments.write<float>() = static_cast<float>(half[0]) + rest[0];
}

__global__ void beyond_shared(Arguments arguments) {
  AF_SHARED(float, first, 64);
  AF_SHARED(float, second, 64);
  second[threadIdx.x] = 2;
  // By a pointer, since UndefinedBehaviorSanitizer would find it where the size of the array is known.
  float* values = first + static_cast<int>(threadIdx.x) + arguments.count;
  *values = 1;
  arguments.write<float>()[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}

__global__ void beyond_global(Arguments arguments) {
  arguments.write<float>()[static_cast<int>(threadIdx.x) + arguments.count] = 1;
}

#define KERNEL(name) {#name, name}
const std::map<std::string, void (*)(Arguments)> KERNELS = {
    KERNEL(block_sum),
    KERNEL(indices),
    KERNEL(shuffle_int),
    KERNEL(shuffle_float),
    KERNEL(shuffle_double),
    KERNEL(shuffle_long),
    KERNEL(votes),
    KERNEL(atomics),
    KERNEL(widen_halves),
    KERNEL(narrow_to_halves),
    KERNEL(arithmetic),
    KERNEL(uninitialised),
    KERNEL(reverse),
    KERNEL(racing_reverse),
    KERNEL(racing_rounds),
    KERNEL(racing_blocks),
    KERNEL(ended_before_barrier),
    KERNEL(two_barriers),
    KERNEL(lane_outside_its_mask),
    KERNEL(ended_before_shuffle),
    KERNEL(shuffle_in_two_places),
    KERNEL(reads_beyond_its_mask),
    KERNEL(odd_width),
    KERNEL(too_much_shared),
    KERNEL(as_much_shared_as_there_is),
    KERNEL(beyond_shared),
    KERNEL(beyond_global),
};

static_assert(alignof(float2) == 8 && alignof(int2) == 8 && alignof(uint2) == 8);
static_assert(alignof(float4) == 16 && alignof(int4) == 16 && alignof(uint4) == 16 && alignof(double2) == 16);
static_assert(sizeof(uint3) == 12 && sizeof(__half) == 2 && sizeof(__nv_bfloat16) == 2);

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What is wrong with the launch, or nothing.
EXPORTED const char* run(const char* kernel, const unsigned* grid, const unsigned* block, const void* in, void* out,
                         int count) {
  static std::string error;
  try {
    emulation::launch(kernel, KERNELS.at(kernel), dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                      Arguments{in, out, count});
  } catch (const std::runtime_error& thrown) {
    error = thrown.what();
    return error.c_str();
  }
  return nullptr;
}

EXPORTED void set_order(int order) { emulation::set_order(static_cast<emulation::Order>(order)); }

// Objects on the stacks of threads.
EXPORTED int alive() { return living; }

// KERNEL COUNT: with 64 threads, and 64 values in memory.
int main(int, char** arguments) {
  const std::vector<float> in(64);
  std::vector<float> out(64);
  const unsigned grid[] = {2, 1, 1}, block[] = {64, 1, 1};
  const char* error = run(arguments[1], grid, block, in.data(), out.data(), std::atoi(arguments[2]));
  std::puts(error == nullptr ? "done" : error);
}
