#pragma once

#include <cstdint>

namespace mtedit {

// Copies `bytes` on the device, asynchronously on `stream`: the benchmarks' measured ceiling of device bandwidth.
// Throws std::runtime_error with CUDA's own message.
void device_copy(std::uintptr_t dst, std::uintptr_t src, std::int64_t bytes, std::uintptr_t stream, int device);

}  // namespace mtedit
