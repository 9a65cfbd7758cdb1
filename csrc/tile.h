#pragma once

#include <algorithm>
#include <cstdint>

namespace mtedit {

// Elements of one sample that are worked on at a time. Fixed, and counted from the sample's first element, so that
// results depend on neither the batch nor the number of threads; a few fp32 tiles fit in the L1 cache.
constexpr int kTile = 1024;

inline std::int64_t tiles_of(std::int64_t numel) { return (numel + kTile - 1) / kTile; }

// Calls body(sample, first element, elements) for every tile, over at most `threads` OpenMP threads.
template <class Body>
void for_each_tile(std::int64_t batch, std::int64_t numel, int threads, const Body& body) {
  const std::int64_t tiles = tiles_of(numel);
  const std::int64_t total = batch * tiles;
  const int team = static_cast<int>(std::min<std::int64_t>(threads, std::max<std::int64_t>(total / 8, 1)));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (std::int64_t t = 0; t < total; ++t) {
    const std::int64_t offset = t % tiles * kTile;
    body(t / tiles, offset, static_cast<int>(std::min<std::int64_t>(kTile, numel - offset)));
  }
  (void)team;
}

}  // namespace mtedit
