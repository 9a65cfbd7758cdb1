#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_copy.h"

namespace mtedit {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread

__global__ void __launch_bounds__(kThreads) copy_vectors(uint4* __restrict__ dst, const uint4* __restrict__ src,
                                                         std::int64_t vectors) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads * kUnroll;
  std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  for (; block < vectors; block += stride) {
    uint4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (block + i * kThreads < vectors) held[i] = __ldcs(src + block + i * kThreads);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (block + i * kThreads < vectors) __stcs(dst + block + i * kThreads, held[i]);
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("device_copy: ") + cudaGetErrorString(error));
}

}  // namespace

void device_copy(std::uintptr_t dst, std::uintptr_t src, std::int64_t bytes, std::uintptr_t stream, int device) {
  check(cudaSetDevice(device));
  const std::int64_t vectors = bytes / 16;
  if (vectors == 0) return;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const std::int64_t needed = (vectors + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  const auto grid = static_cast<unsigned>(needed < 8LL * processors ? needed : 8LL * processors);
  copy_vectors<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<uint4*>(dst), reinterpret_cast<const uint4*>(src), vectors);
  check(cudaGetLastError());
}

}  // namespace mtedit
