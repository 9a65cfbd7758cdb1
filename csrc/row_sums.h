// Sums over a tile: short fp32 sums in 32 lanes, joined as a tree, so that they are accurate, and added up in one order
// for every instruction set.
#pragma once

namespace mtedit {

// sum x y
double dot(const float* x, const float* y, int n);

// sum (p - q)^2
double squared_distance(const float* p, const float* q, int n);

// Adds sum |x| to sums[0] and sum x^2 to sums[1].
void add_moments(const float* x, int n, double* sums);

}  // namespace mtedit
