#include "seeded_noise.h"

#include <algorithm>

#include "philox.h"
#include "tile.h"
#include "vectorize.h"

namespace mtedit {
namespace {

constexpr int kGroups = 64;  // of four normals, worked on side by side

// Groups [first, first + count) of the stream, count <= kGroups; all kGroups are computed.
MTEDIT_VECTORIZE void fill_groups(std::uint32_t key_lo, std::uint32_t key_hi, std::uint32_t first, std::uint32_t step,
                                  int count, float* out) {
  std::uint32_t x[kGroups], y[kGroups], z[kGroups], w[kGroups];
  float normals[4][kGroups];
  for (int g = 0; g < kGroups; ++g) {
    x[g] = first + static_cast<std::uint32_t>(g);
    y[g] = step;
    z[g] = w[g] = 0u;
  }
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) philox_round(key_lo, key_hi, x[g], y[g], z[g], w[g]);
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) box_muller(x[g], y[g], normals[0][g], normals[1][g]);
  for (int g = 0; g < kGroups; ++g) box_muller(z[g], w[g], normals[2][g], normals[3][g]);
  for (int g = 0; g < count; ++g) {
    for (int lane = 0; lane < 4; ++lane) out[4 * g + lane] = normals[lane][g];
  }
}

}  // namespace

void standard_normals(std::int64_t seed, std::int64_t step, std::int64_t offset, int n, float* out) {
  const auto key = static_cast<std::uint64_t>(seed);
  const auto first = static_cast<std::uint32_t>(offset / 4);
  const int groups = (n + 3) / 4;
  for (int g = 0; g < groups; g += kGroups) {
    fill_groups(static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32),
                first + static_cast<std::uint32_t>(g), static_cast<std::uint32_t>(step), std::min(kGroups, groups - g),
                out + 4 * g);
  }
}

void seeded_noise(const std::int64_t* seed, const std::int64_t* step, std::int64_t batch, std::int64_t numel,
                  void* out, DType dtype, int threads) {
  for_each_tile(batch, numel, threads, [&](std::int64_t b, std::int64_t offset, int n) {
    alignas(64) float normals[kTile];
    standard_normals(seed[b], step[b], offset, n, normals);
    store(out, dtype, b * numel + offset, n, normals);
  });
}

}  // namespace mtedit
