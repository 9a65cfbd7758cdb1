// Where crops read and with what weights: the arithmetic that CPU and CUDA share. Its definition, and that of the whole
// op, is mtedit_fast/ops/crop_resize.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MTEDIT_BOTH __host__ __device__ inline
#else
#define MTEDIT_BOTH inline
#endif

namespace mtedit {

// Strides count elements; sides are below 2^31.
struct Image {
  const void* data;  // [channels, height, width]
  std::int64_t height, width, row_stride, pixel_stride, channel_stride;
};

// `count` images of one size, `image_stride` apart; or, where `table` is given, each described there.
struct Images {
  Image first;
  std::int64_t image_stride, count;
  const Image* table;
};

// Image i, its data still at that of image 0, and in `offset` the elements from there to its own.
MTEDIT_BOTH Image image_at(const Images& images, std::int64_t i, std::int64_t& offset) {
  offset = images.table ? 0 : i * images.image_stride;
  return images.table ? images.table[i] : images.first;
}

// One axis of a crop: output i is centred on start + (i + 1/2) scale, counted from pixel `first` of the image, and
// reads none but the `count` pixels that the box touches. count is 0 where the box misses the image, or is NaN.
struct Axis {
  double start, scale, stretch, radius;
  std::int32_t first, count;
};

MTEDIT_BOTH Axis axis_of(double low, double high, std::int64_t size, std::int64_t out, bool cubic) {
  if (!(low < high)) return {};
  const double end = static_cast<double>(size);
  low = low > 0.0 ? low : 0.0;
  high = high < end ? high : end;
  if (!(low < high)) return {};
  const auto first = static_cast<std::int32_t>(low);
  auto last = static_cast<std::int32_t>(high);
  last += static_cast<double>(last) < high;
  const double scale = (high - low) / static_cast<double>(out);
  const double stretch = scale > 1.0 ? scale : 1.0;
  return {low - static_cast<double>(first), scale, stretch, (cubic ? 2.0 : 1.0) * stretch, first, last - first};
}

// Pixels first, ..., first + count - 1 of an axis, and the centre they are weighted around.
struct Taps {
  double centre;
  std::int32_t first, count;
};

MTEDIT_BOTH Taps taps_of(const Axis& axis, std::int64_t i) {
  const double centre = axis.start + (static_cast<double>(i) + 0.5) * axis.scale;
  const auto low = static_cast<std::int32_t>(centre - axis.radius + 0.5);
  const auto high = static_cast<std::int32_t>(centre + axis.radius + 0.5);
  const std::int32_t first = low > 0 ? low : 0;
  return {centre, first, (high < axis.count ? high : axis.count) - first};
}

// Triangle, or Keys' cubic with a = -1/2, at |x|.
MTEDIT_BOTH double filter_at(double x, bool cubic) {
  x = x < 0.0 ? -x : x;
  if (!cubic) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  return x < 2.0 ? -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0) : 0.0;
}

// Weight of tap k before the division by the sum of all.
MTEDIT_BOTH double weight_of(const Axis& axis, const Taps& taps, std::int32_t k, bool cubic) {
  return filter_at((static_cast<double>(taps.first + k) + 0.5 - taps.centre) / axis.stretch, cubic);
}

MTEDIT_BOTH double weight_sum(const Axis& axis, const Taps& taps, bool cubic) {
  double sum = 0.0;
  for (std::int32_t k = 0; k < taps.count; ++k) sum += weight_of(axis, taps, k, cubic);
  return sum;
}

}  // namespace mtedit
