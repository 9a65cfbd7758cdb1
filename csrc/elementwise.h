// Loops over a tile that more than one op has.
#pragma once

namespace mtedit {

// sum += x
void accumulate(const float* x, int n, float* sum);

// out = k (x - y)
void scaled_difference(float k, const float* x, const float* y, int n, float* out);

}  // namespace mtedit
