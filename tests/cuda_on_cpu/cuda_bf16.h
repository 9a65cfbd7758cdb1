#pragma once

#include "../../csrc/dtype.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  float result;
  return *mtedit::load(&value, mtedit::DType::kBFloat16, 0, 1, &result);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 result;
  mtedit::store(&result, mtedit::DType::kBFloat16, 0, 1, &value);
  return result;
}
