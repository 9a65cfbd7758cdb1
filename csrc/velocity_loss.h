#pragma once

#include <cstdint>

#include "dtype.h"

namespace mtedit {

// What nft_loss and crd_loss are computed from. `old` and `reference` may be absent.
struct VelocityLoss {
  Array theta, old, target, reference;
  std::int64_t batch, numel;
  int threads;
};

// [5, batch]: the means over a sample of |p|, p^2, |m|, m^2 and (theta - reference)^2. With o = old - target and
// d = theta - old, p = o + beta d and m = o - beta d where `mixed` (nft_loss), else p = theta - target and m = o.
// Without `old`, p = theta - target. Means of what is absent are 0.
void velocity_moments(const VelocityLoss& in, bool mixed, float beta, float* means);

// c0 o + c1 d + c2 (theta - reference), in theta's dtype; c0 (theta - target) + c2 (theta - reference) without `old`.
// `coefficients` is [3, batch].
void velocity_loss_backward(const VelocityLoss& in, const float* coefficients, void* grad);

}  // namespace mtedit
