#include "velocity_loss.h"

#include <vector>

#include "elementwise.h"
#include "row_sums.h"
#include "tile.h"
#include "vectorize.h"

namespace mtedit {
namespace {

constexpr int kMeans = 5;

struct Tile {
  alignas(64) float scratch[4][kTile];
  const float *theta, *old, *target, *reference;  // null where absent

  Tile(const VelocityLoss& in, std::int64_t at, int n)
      : theta(load(in.theta.data, in.theta.dtype, at, n, scratch[0])),
        old(in.old.data ? load(in.old.data, in.old.dtype, at, n, scratch[1]) : nullptr),
        target(load(in.target.data, in.target.dtype, at, n, scratch[2])),
        reference(in.reference.data ? load(in.reference.data, in.reference.dtype, at, n, scratch[3]) : nullptr) {}
};

MTEDIT_VECTORIZE void subtract(const float* x, const float* y, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] - y[i];
}

// o + beta d and o - beta d.
MTEDIT_VECTORIZE void mix(const float* theta, const float* old, const float* target, float beta, int n, float* plus,
                          float* minus) {
  for (int i = 0; i < n; ++i) {
    const float offset = old[i] - target[i], step = beta * (theta[i] - old[i]);
    plus[i] = offset + step;
    minus[i] = offset - step;
  }
}

MTEDIT_VECTORIZE void add_scaled_difference(float k, const float* x, const float* y, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] += k * (x[i] - y[i]);
}

}  // namespace

void velocity_moments(const VelocityLoss& in, bool mixed, float beta, float* means) {
  const std::int64_t tiles = tiles_of(in.numel);
  std::vector<double> partial(kMeans * in.batch * tiles);
  for_each_tile(in.batch, in.numel, in.threads, [&](std::int64_t b, std::int64_t offset, int n) {
    const Tile tile(in, b * in.numel + offset, n);
    double* sums = &partial[kMeans * (b * tiles + offset / kTile)];
    alignas(64) float plus[kTile], minus[kTile];
    if (tile.old && mixed) {
      mix(tile.theta, tile.old, tile.target, beta, n, plus, minus);
    } else {
      subtract(tile.theta, tile.target, n, plus);
      if (tile.old) subtract(tile.old, tile.target, n, minus);
    }
    add_moments(plus, n, sums);
    if (tile.old) add_moments(minus, n, sums + 2);
    if (tile.reference) sums[4] = squared_distance(tile.theta, tile.reference, n);
  });
  for (std::int64_t b = 0; b < in.batch; ++b) {
    double sums[kMeans] = {};
    for (std::int64_t t = 0; t < tiles; ++t) {
      for (int k = 0; k < kMeans; ++k) sums[k] += partial[kMeans * (b * tiles + t) + k];
    }
    for (int k = 0; k < kMeans; ++k) means[k * in.batch + b] = static_cast<float>(sums[k] / static_cast<double>(in.numel));
  }
}

void velocity_loss_backward(const VelocityLoss& in, const float* coefficients, void* grad) {
  for_each_tile(in.batch, in.numel, in.threads, [&](std::int64_t b, std::int64_t offset, int n) {
    const std::int64_t at = b * in.numel + offset;
    const Tile tile(in, at, n);
    alignas(64) float out[kTile];
    scaled_difference(coefficients[b], tile.old ? tile.old : tile.theta, tile.target, n, out);
    if (tile.old) add_scaled_difference(coefficients[in.batch + b], tile.theta, tile.old, n, out);
    if (tile.reference) add_scaled_difference(coefficients[2 * in.batch + b], tile.theta, tile.reference, n, out);
    store(grad, in.theta.dtype, at, n, out);
  });
}

}  // namespace mtedit
