#include "elementwise.h"

#include "vectorize.h"

namespace mtedit {

MTEDIT_VECTORIZE void accumulate(const float* x, int n, float* sum) {
  for (int i = 0; i < n; ++i) sum[i] += x[i];
}

MTEDIT_VECTORIZE void scaled_difference(float k, const float* x, const float* y, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = k * (x[i] - y[i]);
}

}  // namespace mtedit
