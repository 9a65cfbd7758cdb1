#include "token_similarity.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "elementwise.h"
#include "row_sums.h"
#include "vectorize.h"

namespace mtedit {
namespace {

constexpr int kGroup = 16;  // tokens added up before they join a sum: long fp32 sums stay accurate

MTEDIT_VECTORIZE void add_scaled(float k, const float* x, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] += k * x[i];
}

// (total - unit (unit . total)) / |x|, of unit = x / |x|.
MTEDIT_VECTORIZE void project(const float* x, float inverse, float along, const float* total, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = (total[i] - x[i] * inverse * along) * inverse;
}

const float* token(const Tokens& in, std::int64_t row, std::int64_t n, float* scratch) {
  const std::int64_t at = row * in.row_stride + n * in.token_stride;
  return load(in.data.data, in.data.dtype, at, static_cast<int>(in.width), scratch);
}

// 0 for a token of norm 0.
float inverse_norm(const float* x, int n) {
  const double square = dot(x, x, n);
  return square == 0.0 ? 0.0f : static_cast<float>(1.0 / std::sqrt(square));
}

int team_of(std::int64_t elements, int threads) {
  return static_cast<int>(std::min<std::int64_t>(threads, std::max<std::int64_t>(elements / 8192, 1)));
}

}  // namespace

void token_pool(const Tokens& in, const std::int64_t* index, std::int64_t count, const float* weights, bool normalize,
                int threads, float* out) {
  const int width = static_cast<int>(in.width), team = team_of(count * in.tokens * in.width, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    std::vector<float> scratch(in.width), group(in.width);
#pragma omp for schedule(static)
    for (std::int64_t p = 0; p < count; ++p) {
      float* sum = out + p * in.width;
      std::fill_n(sum, in.width, 0.0f);
      for (std::int64_t first = 0; first < in.tokens; first += kGroup) {
        std::fill(group.begin(), group.end(), 0.0f);
        for (std::int64_t n = first; n < std::min(first + kGroup, in.tokens); ++n) {
          float factor = weights ? weights[p * in.tokens + n] : 1.0f;
          if (factor == 0.0f) continue;
          const float* x = token(in, index[p], n, scratch.data());
          if (normalize) factor *= inverse_norm(x, width);
          add_scaled(factor, x, width, group.data());
        }
        accumulate(group.data(), width, sum);
      }
    }
  }
  (void)team;
}

void token_pool_backward(const Tokens& in, const std::int64_t* index, std::int64_t count, const float* weights,
                         const float* grad_pooled, bool normalize, int threads, void* grad) {
  const int width = static_cast<int>(in.width), team = team_of(in.rows * in.tokens * in.width, threads);
  std::vector<std::vector<std::int64_t>> pairs(in.rows);  // of each row, in their order
  for (std::int64_t p = 0; p < count; ++p) pairs[index[p]].push_back(p);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    std::vector<float> scratch(in.width), total(in.width), result(in.width);
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < in.rows * in.tokens; ++t) {
      const std::int64_t row = t / in.tokens, n = t % in.tokens;
      std::fill(total.begin(), total.end(), 0.0f);
      for (const std::int64_t p : pairs[row]) {
        add_scaled(weights ? weights[p * in.tokens + n] : 1.0f, grad_pooled + p * in.width, width, total.data());
      }
      const float* found = total.data();
      if (normalize && std::any_of(total.begin(), total.end(), [](float x) { return x != 0.0f; })) {
        const float* x = token(in, row, n, scratch.data());
        const float inverse = inverse_norm(x, width);
        const auto along = static_cast<float>(inverse * dot(x, total.data(), width));
        project(x, inverse, along, total.data(), width, result.data());
        found = result.data();
      }
      store(grad, in.data.dtype, t * in.width, width, found);
    }
  }
  (void)team;
}

}  // namespace mtedit
