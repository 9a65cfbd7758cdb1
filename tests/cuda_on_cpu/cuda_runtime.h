// As much of CUDA as csrc/crop_resize.cu needs, on the CPU: a block's threads are coroutines that __syncthreads switches
// between, blocks follow one another, and "device" memory is the host's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx;
using std::max;
using std::min;

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace emulated {

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool done = false;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void enter() {
  body();
  threads[threadIdx.x].done = true;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

inline void run_block(unsigned count) {
  threads.resize(count);
  for (Thread& thread : threads) {
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = 1 << 16;
    makecontext(&thread.context, enter, 0);
  }
  for (unsigned finished = 0; finished < count;) {
    finished = 0;
    for (unsigned i = 0; i < count; ++i) {
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
      finished += threads[i].done;
    }
    if (finished != 0 && finished != count) std::abort();  // some threads missed a __syncthreads
  }
}

}  // namespace emulated

inline void __syncthreads() {
  swapcontext(&emulated::threads[threadIdx.x].context, &emulated::scheduler);
}

template <class Kernel, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Arguments&... arguments) {
  emulated::body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    blockIdx.x = block;
    emulated::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
