// What csrc's host code calls of CUDA's runtime, for a device that is a Python function: a launch goes to it.

#include <cuda_runtime.h>

#include <string>
#include <unordered_map>
#include <utility>

namespace {

// Kernel's name, grid, block, bytes of shared memory, addresses of the arguments -> 0, or an error's number.
using Launch = int (*)(const char*, const unsigned*, const unsigned*, std::size_t, void**);

Launch device = nullptr;
int processors = 0;
cudaError_t failure = cudaSuccess;  // of the last launch
struct Configuration {
  dim3 grid, block;
  std::size_t shared = 0;
  cudaStream_t stream = nullptr;
} pushed;  // by <<<...>>>, until its launch

std::unordered_map<const void*, std::string>& names() {  // of kernels, by their host functions; filled before main
  static std::unordered_map<const void*, std::string> all;
  return all;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared) {
  const auto found = names().find(kernel);
  if (device == nullptr || found == names().end()) return failure = cudaErrorInvalidDeviceFunction;
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  return failure = static_cast<cudaError_t>(device(found->second.c_str(), blocks, threads, shared, arguments));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_machine_connect(Launch function, int multiprocessors) {
  device = function;
  processors = multiprocessors;
}

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  return launch(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaSetDevice(int number) { return number == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetLastError() { return std::exchange(failure, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "the machine stopped"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorNotSupported;
  *value = processors;
  return cudaSuccess;
}

}  // extern "C"
