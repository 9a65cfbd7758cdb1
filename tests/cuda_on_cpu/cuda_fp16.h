#pragma once

#include "../../csrc/dtype.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  float result;
  return *mtedit::load(&value, mtedit::DType::kFloat16, 0, 1, &result);
}

inline __half __float2half_rn(float value) {
  __half result;
  mtedit::store(&result, mtedit::DType::kFloat16, 0, 1, &value);
  return result;
}
