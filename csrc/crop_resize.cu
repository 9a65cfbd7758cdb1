#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "crop_resize.h"

namespace mtedit {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;     // a block's outputs: a tile of kRows by kColumns of one crop, every channel
constexpr int kColumns = 64;
constexpr int kTaps = 64;     // weights of longer filters (above 15:1) are computed as they are needed
constexpr int kChunk = 128;   // source columns worked on at a time
constexpr int kGroup = 16;    // terms added up before they join a sum: long fp32 sums stay accurate

// The weights of one output along an axis. Where they fit they are in a table, [tap][output].
struct Filter {
  Taps taps;
  double scale;  // of the weights
};

__device__ float weight_at(const Axis& axis, const Filter& filter, const float* table, int pitch, int k, bool cubic) {
  if (filter.taps.count <= kTaps) return table[k * pitch];
  return static_cast<float>(filter.scale * weight_of(axis, filter.taps, k, cubic));
}

// Of output i; the weights add up to `total`.
__device__ Filter make_filter(const Axis& axis, std::int64_t i, double total, bool cubic, float* table, int pitch) {
  Filter filter{taps_of(axis, i), 0.0};
  filter.scale = total / weight_sum(axis, filter.taps, cubic);
#pragma unroll 1
  for (int k = 0; filter.taps.count <= kTaps && k < filter.taps.count; ++k) {
    table[k * pitch] = static_cast<float>(filter.scale * weight_of(axis, filter.taps, k, cubic));
  }
  return filter;
}

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(std::uint8_t value) { return static_cast<float>(value); }

__device__ void put(void* out, DType dtype, std::int64_t at, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(out)[at] = value; break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value); break;
    case DType::kFloat16: static_cast<__half*>(out)[at] = __float2half_rn(value); break;
  }
}

struct Tile {
  Axis x, y;
  Filter columns[kColumns], rows[kRows];
  float x_weights[kTaps * kColumns], y_weights[kTaps * kRows];
  float band[kRows * kChunk];  // the tile's rows at source columns
};

// Fills `band` with the tile's rows at source columns [begin, begin + width).
template <class In>
__device__ void sum_rows(const In* source, const Image& image, int begin, int width, int rows, bool cubic, Tile& tile) {
  for (int at = static_cast<int>(threadIdx.x); at < rows * width; at += kThreads) {
    const int row = at / width, x = at % width;
    const Filter& filter = tile.rows[row];
    const int taps = filter.taps.count;
    const In* pixel = source + filter.taps.first * image.row_stride + (begin + x) * image.pixel_stride;
    float sum = 0.0f;
    for (int group = 0; group < taps; group += kGroup) {
      const int stop = min(group + kGroup, taps);
      float part = 0.0f;
      for (int k = group; k < stop; ++k, pixel += image.row_stride) {
        part += weight_at(tile.y, filter, tile.y_weights + row, kRows, k, cubic) * to_float(*pixel);
      }
      sum += part;
    }
    tile.band[row * kChunk + x] = sum;
  }
}

// A thread's outputs: one column of the tile, rows kStep apart.
constexpr int kStep = kThreads / kColumns;
constexpr int kOutputs = kRows / kStep;

// Adds what source columns [begin, end), which `band` holds, give to the thread's outputs.
__device__ void add_columns(int column, int first_row, int begin, int end, bool cubic, const Tile& tile,
                            float (&sums)[kOutputs]) {
  const Filter& filter = tile.columns[column];
  const int first = filter.taps.first;
  const int a = max(first, begin), b = min(first + filter.taps.count, end);
  for (int group = a; group < b; group += kGroup) {
    float parts[kOutputs] = {};
    const int stop = min(group + kGroup, b);
    for (int x = group; x < stop; ++x) {
      const float weight = weight_at(tile.x, filter, tile.x_weights + column, kColumns, x - first, cubic);
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        parts[j] += weight * tile.band[(first_row + j * kStep) * kChunk + x - begin];
      }
    }
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) sums[j] += parts[j];
  }
}

template <class In>
__global__ void __launch_bounds__(kThreads, 3) crop_tile(CropResize in) {
  __shared__ Tile tile;
  const int thread = static_cast<int>(threadIdx.x);
  const auto tiles_x = static_cast<unsigned>((in.width + kColumns - 1) / kColumns);
  const auto tiles_y = static_cast<unsigned>((in.height + kRows - 1) / kRows);
  const std::int64_t crop = blockIdx.x / tiles_x / tiles_y;
  const std::int64_t x0 = blockIdx.x % tiles_x * kColumns, y0 = blockIdx.x / tiles_x % tiles_y * kRows;
  const int columns = static_cast<int>(in.width - x0 < kColumns ? in.width - x0 : kColumns);
  const int rows = static_cast<int>(in.height - y0 < kRows ? in.height - y0 : kRows);

  std::int64_t offset = 0;
  Image image{};
  const std::int64_t index = in.index[crop];
  if (index >= 0 && index < in.images.count) image = image_at(in.images, index, offset);
  if (thread == 0) {
    const double* box = in.boxes + 4 * crop;
    tile.x = axis_of(box[0], box[2], image.width, in.width, in.cubic);
    tile.y = axis_of(box[1], box[3], image.height, in.height, in.cubic);
  }
  __syncthreads();
  const bool missing = tile.x.count == 0 || tile.y.count == 0;
  if (!missing && thread < columns) {
    tile.columns[thread] = make_filter(tile.x, x0 + thread, 1.0, in.cubic, tile.x_weights + thread, kColumns);
  } else if (!missing && thread >= kColumns && thread < kColumns + rows) {
    const int row = thread - kColumns;
    const double unit = unit_of(in.pixel);
    tile.rows[row] = make_filter(tile.y, y0 + row, unit, in.cubic, tile.y_weights + row, kRows);
  }
  __syncthreads();

  const Taps right = tile.columns[columns - 1].taps;
  const int begin = missing ? 0 : tile.columns[0].taps.first, end = missing ? 0 : right.first + right.count;
  const int column = thread % kColumns, first_row = thread / kColumns;
  offset += tile.y.first * image.row_stride + tile.x.first * image.pixel_stride;
  for (int c = 0; c < in.channels; ++c) {
    const In* source = static_cast<const In*>(image.data) + offset + c * image.channel_stride;
    float sums[kOutputs] = {};
    for (int chunk = begin; chunk < end; chunk += kChunk) {
      const int stop = min(chunk + kChunk, end);
      sum_rows(source, image, chunk, stop - chunk, rows, in.cubic, tile);
      __syncthreads();
      if (column < columns) add_columns(column, first_row, chunk, stop, in.cubic, tile, sums);
      __syncthreads();
    }
    const std::int64_t out = ((crop * in.channels + c) * in.height + y0) * in.width + x0;
    for (int j = 0; j < kOutputs; ++j) {
      const int row = first_row + j * kStep;
      if (row < rows && column < columns) {
        const float value = missing ? NAN : sums[j] * in.gain[c] + in.bias[c];
        put(in.out, in.out_dtype, out + row * in.width + column, value);
      }
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("crop_resize: ") + cudaGetErrorString(error));
}

template <class In>
void launch(const CropResize& in, unsigned tiles, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(tiles);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, crop_tile<In>, in));
}

}  // namespace

void crop_resize_cuda(const CropResize& in, std::uintptr_t stream_handle, int device) {
  check(cudaSetDevice(device));
  const std::int64_t tiles = in.crops * ((in.width + kColumns - 1) / kColumns) * ((in.height + kRows - 1) / kRows);
  if (tiles == 0) return;
  if (tiles > std::numeric_limits<std::int32_t>::max()) {
    throw std::runtime_error("crop_resize: more output than one launch takes: crop fewer boxes at a time");
  }
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const auto grid = static_cast<unsigned>(tiles);
  switch (in.pixel) {
    case Pixel::kFloat32: return launch<float>(in, grid, stream);
    case Pixel::kBFloat16: return launch<__nv_bfloat16>(in, grid, stream);
    case Pixel::kFloat16: return launch<__half>(in, grid, stream);
    case Pixel::kUInt8: return launch<std::uint8_t>(in, grid, stream);
  }
}

}  // namespace mtedit
