#pragma once

#include <cstdint>

#include "dtype.h"

namespace mtedit {

enum class LogProb : int { kNone = 0, kGaussian = 1, kSquared = 2 };

// One step x' = a x + b v + c noise of every sample. The noise is `noise`, or drawn from `seed` (stream step + 1; 0 is
// the initial noise), or implied by `prev_sample` (replay). `table` is [rows, 4]: a, b, c, std; `step` is [batch].
struct SDEStep {
  Array sample, velocity, noise, prev_sample;
  const std::int64_t* seed;
  const float* table;
  const std::int64_t* step;
  std::int64_t rows, batch, numel;
  DType out_dtype;    // storage of the new prev_sample
  LogProb log_prob;
  bool round_before;  // the log-prob sees prev_sample rounded to out_dtype
  int threads;
};

// Outputs may be null: prev_sample [batch, numel] out_dtype, log_prob [batch] fp32, mean [batch, numel] fp32.
void sde_step_forward(const SDEStep& in, void* prev_sample, float* log_prob, float* mean);

// Gradients with respect to sample and velocity, in their own dtypes. grad_sample and the incoming ones may be null.
void sde_step_backward(const SDEStep& in, const Array& grad_prev, const float* grad_log_prob, const float* grad_mean,
                       void* grad_sample, void* grad_velocity);

}  // namespace mtedit
