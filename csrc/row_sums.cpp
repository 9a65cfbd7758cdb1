#include "row_sums.h"

#include <cmath>

#include "vectorize.h"

namespace mtedit {
namespace {

constexpr int kLanes = 32;

inline float join(float (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

}  // namespace

MTEDIT_VECTORIZE double dot(const float* x, const float* y, int n) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += x[i + j] * y[i + j];
  return join(lanes);
}

MTEDIT_VECTORIZE double squared_distance(const float* p, const float* q, int n) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += (p[i + j] - q[i + j]) * (p[i + j] - q[i + j]);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += (p[i + j] - q[i + j]) * (p[i + j] - q[i + j]);
  return join(lanes);
}

MTEDIT_VECTORIZE void add_moments(const float* x, int n, double* sums) {
  float sizes[kLanes] = {}, squares[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      sizes[j] += std::fabs(x[i + j]);
      squares[j] += x[i + j] * x[i + j];
    }
  }
  for (int j = 0; i + j < n; ++j) {
    sizes[j] += std::fabs(x[i + j]);
    squares[j] += x[i + j] * x[i + j];
  }
  sums[0] += join(sizes);
  sums[1] += join(squares);
}

}  // namespace mtedit
