// fp32 <-> storage dtypes. Rounding is to nearest, ties to even, as torch does it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtedit {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Array {
  const void* data;  // contiguous [batch, numel]; null where absent
  DType dtype;
};

inline std::size_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Reads n elements from `offset` on as fp32: a pointer into the data itself where it is fp32, else into `scratch`.
const float* load(const void* data, DType dtype, std::int64_t offset, int n, float* scratch);

// Writes n fp32 values, rounded to `dtype`, from `offset` on.
void store(void* data, DType dtype, std::int64_t offset, int n, const float* values);

}  // namespace mtedit
