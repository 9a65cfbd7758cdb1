#pragma once

#include <cstdint>

#include "dtype.h"
#include "resample.h"

namespace mtedit {

constexpr int kMaxChannels = 4;

// Storage of source pixels. The first three are DType's.
enum class Pixel : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// What a stored value counts: bytes are in 1/255. Row weights hold it.
MTEDIT_BOTH double unit_of(Pixel pixel) { return pixel == Pixel::kUInt8 ? 1.0 / 255.0 : 1.0; }

// Antialiased crops, out[i, c] = gain[c] * resized(image index[i], box i)[c] + bias[c]. What cannot be cropped (a box
// that misses its image, an index of no image) is NaN.
struct CropResize {
  Images images;
  int channels;  // 1 to kMaxChannels
  Pixel pixel;
  const double* boxes;        // [crops, 4]: x0, y0, x1, y1
  const std::int64_t* index;  // [crops]
  std::int64_t crops, height, width;
  bool cubic;
  float gain[kMaxChannels], bias[kMaxChannels];
  void* out;  // [crops, channels, height, width]
  DType out_dtype;
};

// On the CPU. Images have pixel_stride 1, or channel_stride 1 and a pixel_stride of at most kMaxChannels.
void crop_resize(const CropResize& in, int threads);

// On a device, asynchronously on `stream`; every pointer is the device's. Any strides.
// Throws std::runtime_error with CUDA's own message.
void crop_resize_cuda(const CropResize& in, std::uintptr_t stream, int device);

}  // namespace mtedit
