#pragma once

#include <cstdint>

#include "dtype.h"

namespace mtedit {

// Standard normals of elements [offset, offset + n) of the stream (seed, step); offset is a multiple of 4 and `out`
// has room for n rounded up to a multiple of 4. Element e is lane e % 4 of Philox key (seed low, high), counter
// (e / 4, step, 0, 0), so it depends neither on the batch nor on the split.
void standard_normals(std::int64_t seed, std::int64_t step, std::int64_t offset, int n, float* out);

// out[b, :] = `numel` normals of stream (seed[b], step[b]).
void seeded_noise(const std::int64_t* seed, const std::int64_t* step, std::int64_t batch, std::int64_t numel,
                  void* out, DType dtype, int threads);

}  // namespace mtedit
