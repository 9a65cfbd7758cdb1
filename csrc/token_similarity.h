#pragma once

#include <cstdint>

#include "dtype.h"

namespace mtedit {

// [rows, tokens, width], the elements of a token side by side.
struct Tokens {
  Array data;
  std::int64_t rows, tokens, width, row_stride, token_stride;
};

// out[p] = sum of weights[p, n] x the tokens n of row index[p], [count, width]. With `normalize` each token is divided by
// its L2 norm first; one of norm 0 counts as 0, and one of weight 0 is not looked at. Without weights they are 1.
void token_pool(const Tokens& in, const std::int64_t* index, std::int64_t count, const float* weights, bool normalize,
                int threads, float* out);

// The gradient to the tokens, in their dtype and contiguous, of the `count` pooled ones' gradient [count, width].
void token_pool_backward(const Tokens& in, const std::int64_t* index, std::int64_t count, const float* weights,
                         const float* grad_pooled, bool normalize, int threads, void* grad);

}  // namespace mtedit
