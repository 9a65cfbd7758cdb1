#include "sde_step.h"

#include <cmath>
#include <vector>

#include "elementwise.h"
#include "row_sums.h"
#include "seeded_noise.h"
#include "tile.h"
#include "vectorize.h"

namespace mtedit {
namespace {

struct Row {
  float a, b, c;
};

struct Step {
  alignas(64) float mean[kTile], prev[kTile], scratch[2][kTile];
};

MTEDIT_VECTORIZE void affine(float a, const float* x, float b, const float* v, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = a * x[i] + b * v[i];
}

MTEDIT_VECTORIZE void add_scaled(const float* mean, float c, const float* noise, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = mean[i] + c * noise[i];
}

MTEDIT_VECTORIZE void scale(float k, const float* in, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = k * in[i];
}

// NaN for a step outside the schedule, as in the reference: a device-side index is not worth an exception.
Row row_of(const SDEStep& in, std::int64_t b) {
  if (in.step[b] < 0 || in.step[b] >= in.rows) return {NAN, NAN, NAN};
  const float* row = in.table + 4 * in.step[b];
  return {row[0], row[1], row[2]};
}

// Fills tile.mean and returns prev_sample as the log-prob sees it, in fp32. A new one is stored in `out` from
// `out_at` on. Sampling and replay run the same code on the same values, hence give the same bits.
const float* step_tile(const SDEStep& in, const Row& row, std::int64_t b, std::int64_t offset, int n, Step& tile,
                       void* out, std::int64_t out_at) {
  const std::int64_t at = b * in.numel + offset;
  const float* x = load(in.sample.data, in.sample.dtype, at, n, tile.scratch[0]);
  const float* v = load(in.velocity.data, in.velocity.dtype, at, n, tile.scratch[1]);
  affine(row.a, x, row.b, v, n, tile.mean);
  if (in.prev_sample.data) return load(in.prev_sample.data, in.prev_sample.dtype, at, n, tile.prev);
  const float* prev = tile.mean;
  if (row.c != 0.0f && (in.seed || in.noise.data)) {  // NaN outside of the schedule, where there may be no noise
    const float* noise = tile.scratch[0];
    if (in.seed) {
      standard_normals(in.seed[b], in.step[b] + 1, offset, n, tile.scratch[0]);
    } else {
      noise = load(in.noise.data, in.noise.dtype, at, n, tile.scratch[0]);
    }
    add_scaled(tile.mean, row.c, noise, n, tile.prev);
    prev = tile.prev;
  }
  store(out, in.out_dtype, out_at, n, prev);
  return in.round_before ? load(out, in.out_dtype, out_at, n, tile.prev) : prev;
}

float log_prob_of(LogProb kind, float c, double mean_square) {
  if (c == 0.0f) return static_cast<float>(0.0 * mean_square);  // deterministic: 0, or NaN where the velocity is
  if (kind == LogProb::kSquared) return static_cast<float>(-mean_square);
  const double variance = static_cast<double>(c) * c;
  return static_cast<float>(-mean_square / (2.0 * variance) - std::log(static_cast<double>(c)) -
                            0.9189385332046727);  // ln(2 pi) / 2
}

}  // namespace

void sde_step_forward(const SDEStep& in, void* prev_sample, float* log_prob, float* mean) {
  const std::int64_t tiles = tiles_of(in.numel);
  std::vector<double> squares(log_prob ? in.batch * tiles : 0);
  for_each_tile(in.batch, in.numel, in.threads, [&](std::int64_t b, std::int64_t offset, int n) {
    Step tile;
    const std::int64_t at = b * in.numel + offset;
    const float* prev = step_tile(in, row_of(in, b), b, offset, n, tile, prev_sample, at);
    if (mean) store(mean, DType::kFloat32, at, n, tile.mean);
    if (log_prob) squares[b * tiles + offset / kTile] = squared_distance(prev, tile.mean, n);
  });
  for (std::int64_t b = 0; log_prob && b < in.batch; ++b) {
    double sum = 0.0;
    for (std::int64_t t = 0; t < tiles; ++t) sum += squares[b * tiles + t];
    log_prob[b] = log_prob_of(in.log_prob, row_of(in, b).c, sum / static_cast<double>(in.numel));
  }
}

void sde_step_backward(const SDEStep& in, const Array& grad_prev, const float* grad_log_prob, const float* grad_mean,
                       void* grad_sample, void* grad_velocity) {
  for_each_tile(in.batch, in.numel, in.threads, [&](std::int64_t b, std::int64_t offset, int n) {
    const std::int64_t at = b * in.numel + offset;
    const Row row = row_of(in, b);
    alignas(64) float grad[kTile] = {};  // with respect to the mean
    alignas(64) float scratch[kTile];
    if (grad_log_prob) {
      Step tile;
      const float* prev = step_tile(in, row, b, offset, n, tile, scratch, 0);
      const double variance = static_cast<double>(row.c) * row.c;
      const double density = variance == 0.0 ? 0.0 : in.log_prob == LogProb::kSquared ? 2.0 : 1.0 / variance;
      const auto k = static_cast<float>(grad_log_prob[b] * density / static_cast<double>(in.numel));
      scaled_difference(k, prev, tile.mean, n, grad);
    }
    if (grad_mean) accumulate(grad_mean + at, n, grad);
    if (grad_prev.data) accumulate(load(grad_prev.data, grad_prev.dtype, at, n, scratch), n, grad);
    scale(row.b, grad, n, scratch);
    store(grad_velocity, in.velocity.dtype, at, n, scratch);
    if (!grad_sample) return;
    scale(row.a, grad, n, scratch);
    store(grad_sample, in.sample.dtype, at, n, scratch);
  });
}

}  // namespace mtedit
