#include "crop_resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectorize.h"

namespace mtedit {
namespace {

constexpr int kLanes = 16;   // output rows side by side
constexpr int kGroup = 16;   // terms added up before they join a sum: long fp32 sums stay accurate
constexpr int kChunk = 256;  // elements of source rows worked on at a time: sums and rows fit in the L1 cache
constexpr int kColumns = 64;  // output columns worked on at a time

// Half of the lanes: what an AVX2 register holds. Wider ones would go through memory there.
typedef float Half __attribute__((vector_size(2 * kLanes)));
constexpr int kHalf = kLanes / 2;

struct Pair {
  Half a{}, b{};
};

// Halves are copied one by one: as a pair they would go through memory.
inline __attribute__((always_inline)) Pair load_pair(const float* values) {
  Pair pair;
  std::memcpy(&pair.a, values, sizeof pair.a);
  std::memcpy(&pair.b, values + kHalf, sizeof pair.b);
  return pair;
}

inline __attribute__((always_inline)) void store_pair(const Pair& pair, float* values) {
  std::memcpy(values, &pair.a, sizeof pair.a);
  std::memcpy(values + kHalf, &pair.b, sizeof pair.b);
}

inline __attribute__((always_inline)) void add_product(const float* values, float weight, Pair& sum) {
  const Pair pair = load_pair(values);
  sum.a += weight * pair.a;
  sum.b += weight * pair.b;
}

struct alignas(64) Column {
  float row[kLanes];
};

// Weights of outputs [begin, end) of an axis, which add up to `total`.
struct Weights {
  std::vector<int> first, count, at;
  std::vector<float> value;

  Weights(const Axis& axis, std::int64_t begin, std::int64_t end, bool cubic, double total) {
    std::vector<double> raw;
    for (std::int64_t i = begin; i < end; ++i) {
      const Taps taps = taps_of(axis, i);
      first.push_back(taps.first);
      count.push_back(taps.count);
      at.push_back(static_cast<int>(value.size()));
      raw.resize(taps.count);
      double sum = 0.0;
      for (int k = 0; k < taps.count; ++k) sum += raw[k] = weight_of(axis, taps, k, cubic);
      for (const double weight : raw) value.push_back(static_cast<float>(total / sum * weight));
    }
  }
};

MTEDIT_VECTORIZE void load_bytes(const std::uint8_t* in, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

const float* load(const void* data, Pixel pixel, std::int64_t offset, int n, float* scratch) {
  if (pixel != Pixel::kUInt8) return load(data, static_cast<DType>(pixel), offset, n, scratch);
  load_bytes(static_cast<const std::uint8_t*>(data) + offset, n, scratch);
  return scratch;
}

// The weighted sum of `taps` times 16 values, `stride` apart. kTaps is their number where it is known, else 0.
template <int kTaps>
inline __attribute__((always_inline)) Pair weighted_sum(const float* values, std::int64_t stride, const float* weight,
                                                        int taps) {
  Pair sum;
  const int count = kTaps ? kTaps : taps;
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) add_product(values + k * stride, weight[k], sum);
  return sum;
}

template <int kTaps>
inline __attribute__((always_inline)) void add_rows_of(const float* const* rows, const float* weight, int taps, int n,
                                                       float* sum) {
  const int count = kTaps ? kTaps : taps;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Pair part;
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) add_product(rows[k] + i, weight[k], part);
    add_product(sum + i, 1.0f, part);
    store_pair(part, sum + i);
  }
  for (; i < n; ++i) {
    float part = 0.0f;
    for (int k = 0; k < count; ++k) part += weight[k] * rows[k][i];
    sum[i] += part;
  }
}

// sum[i] += the weighted sum of `rows` at i; at most kGroup of them.
MTEDIT_VECTORIZE void add_rows(const float* const* rows, const float* weight, int taps, int n, float* sum) {
  switch (taps) {
    case 1: return add_rows_of<1>(rows, weight, taps, n, sum);
    case 2: return add_rows_of<2>(rows, weight, taps, n, sum);
    case 3: return add_rows_of<3>(rows, weight, taps, n, sum);
    case 4: return add_rows_of<4>(rows, weight, taps, n, sum);
    default: return add_rows_of<0>(rows, weight, taps, n, sum);
  }
}

// Outputs x < n of all lanes: of columns `step` apart, count[x] from first[x] on, with the weights at at[x].
MTEDIT_VECTORIZE void add_columns(const Column* columns, int step, const int* first, const int* count, const int* at,
                                  const float* weights, int n, float gain, float bias, Column* out) {
  const std::int64_t stride = step * kLanes;
  for (int x = 0; x < n; ++x) {
    const float* column = columns->row + first[x] * stride;
    const float* weight = weights + at[x];
    Pair total;
    if (count[x] == 4) {
      total = weighted_sum<4>(column, stride, weight, 4);
    } else {
      total = weighted_sum<0>(column, stride, weight, count[x] < kGroup ? count[x] : kGroup);
      for (int k = kGroup; k < count[x]; k += kGroup) {
        const int taps = count[x] - k < kGroup ? count[x] - k : kGroup;
        const Pair part = weighted_sum<0>(column + k * stride, stride, weight + k, taps);
        total.a += part.a;
        total.b += part.b;
      }
    }
    total.a = total.a * gain + bias;
    total.b = total.b * gain + bias;
    store_pair(total, out[x].row);
  }
}

// out[j][i] = in[i][j] for i < rows, a multiple of 4, and j < columns; strides count floats.
MTEDIT_VECTORIZE void transpose(const float* in, std::int64_t in_stride, int rows, int columns, float* out,
                                std::int64_t out_stride) {
  for (int i = 0; i < rows; i += 4, in += 4 * in_stride, out += 4) {
    int j = 0;
#if defined(__SSE__)
    for (; j + 4 <= columns; j += 4) {
      __m128 a = _mm_loadu_ps(in + j), b = _mm_loadu_ps(in + in_stride + j);
      __m128 c = _mm_loadu_ps(in + 2 * in_stride + j), d = _mm_loadu_ps(in + 3 * in_stride + j);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(out + j * out_stride, a);
      _mm_storeu_ps(out + (j + 1) * out_stride, b);
      _mm_storeu_ps(out + (j + 2) * out_stride, c);
      _mm_storeu_ps(out + (j + 3) * out_stride, d);
    }
#endif
    for (; j < columns; ++j) {
      for (int k = 0; k < 4; ++k) out[j * out_stride + k] = in[k * in_stride + j];
    }
  }
}

// Results that no cache would hold are written past it, which spares reading what they replace.
constexpr std::size_t kStreamBytes = 4 << 20;

void stream(const void* in, std::size_t bytes, void* out) {
#if defined(__SSE__)
  if (bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
    for (std::size_t i = 0; i < bytes / 4; i += 4) {
      _mm_stream_ps(static_cast<float*>(out) + i, _mm_loadu_ps(static_cast<const float*>(in) + i));
    }
    return;
  }
#endif
  std::memcpy(out, in, bytes);
}

void finish_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

std::size_t bytes_of(const CropResize& in) {
  return item_size(in.out_dtype) * in.crops * in.channels * in.height * in.width;
}

// Stores n values from element `at` of the result on.
void store_result(const CropResize& in, std::int64_t at, int n, const float* values) {
  if (bytes_of(in) < kStreamBytes) return store(in.out, in.out_dtype, at, n, values);
  alignas(64) float line[kColumns];
  const std::size_t item = item_size(in.out_dtype);
  store(line, in.out_dtype, 0, n, values);
  stream(line, n * item, static_cast<char*>(in.out) + at * item);
}

struct Scratch {
  alignas(64) float sums[kLanes][kChunk];
  alignas(64) float rows[kGroup][kChunk];
  Column columns[kColumns];
  alignas(64) float result[kLanes][kColumns];
  std::vector<Column> band;  // the lanes' rows at the source's columns
};

// Rows of outputs [begin, begin + lanes) of `y`'s, from n elements of every source row, `offset` on, into `band`.
void sum_rows(const CropResize& in, const Image& image, const Weights& y, int begin, int lanes, std::int64_t offset,
              int n, Scratch& scratch, Column* band) {
  std::memset(scratch.sums, 0, sizeof scratch.sums);
  const int low = y.first[begin], high = y.first[begin + lanes - 1] + y.count[begin + lanes - 1];
  // Groups are counted from the crop's first row, so that a row's sum does not depend on which rows are beside it.
  for (int group = low / kGroup * kGroup; group < high; group += kGroup) {
    const int top = std::max(group, low), bottom = std::min(group + kGroup, high);
    const float* rows[kGroup];
    for (int r = top; r < bottom; ++r) {
      rows[r - top] = load(image.data, in.pixel, offset + r * image.row_stride, n, scratch.rows[r - top]);
    }
    for (int j = 0; j < lanes; ++j) {
      const int first = y.first[begin + j], a = std::max(first, top), b = std::min(first + y.count[begin + j], bottom);
      if (a < b) add_rows(rows + a - top, y.value.data() + y.at[begin + j] + a - first, b - a, n, scratch.sums[j]);
    }
  }
  transpose(scratch.sums[0], kChunk, kLanes, n, band->row, kLanes);
}

// Output rows [begin, end) of crop i.
void crop_rows(const CropResize& in, std::int64_t i, std::int64_t begin, std::int64_t end, Scratch& scratch) {
  const std::int64_t plane = in.height * in.width;
  const std::int64_t out = i * in.channels * plane;
  const bool exists = in.index[i] >= 0 && in.index[i] < in.images.count;
  std::int64_t offset = 0;
  const Image image = exists ? image_at(in.images, in.index[i], offset) : Image{};
  const double* box = in.boxes + 4 * i;
  const Axis x_axis = axis_of(box[0], box[2], image.width, in.width, in.cubic);
  const Axis y_axis = axis_of(box[1], box[3], image.height, in.height, in.cubic);
  if (x_axis.count == 0 || y_axis.count == 0) {
    const float nan = NAN;
    for (int c = 0; c < in.channels; ++c) {
      for (std::int64_t at = begin * in.width; at < end * in.width; ++at) {
        store(in.out, in.out_dtype, out + c * plane + at, 1, &nan);
      }
    }
    return;
  }
  const Weights x(x_axis, 0, in.width, in.cubic, 1.0), y(y_axis, begin, end, in.cubic, unit_of(in.pixel));
  offset += y_axis.first * image.row_stride + x_axis.first * image.pixel_stride;
  const bool planar = image.pixel_stride == 1;
  const int step = planar ? 1 : static_cast<int>(image.pixel_stride);
  const int together = planar ? 1 : in.channels;  // channels in one row of memory
  const std::int64_t elements = (x_axis.count - std::int64_t{1}) * step + together;
  scratch.band.resize(std::max<std::size_t>(scratch.band.size(), elements));
  for (std::int64_t row = begin; row < end; row += kLanes) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, end - row));
    for (int c = 0; c < in.channels; ++c) {
      if (c % together == 0) {
        for (std::int64_t at = 0; at < elements; at += kChunk) {
          const int n = static_cast<int>(std::min<std::int64_t>(kChunk, elements - at));
          const std::int64_t from = offset + c * image.channel_stride + at;
          sum_rows(in, image, y, static_cast<int>(row - begin), lanes, from, n, scratch, scratch.band.data() + at);
        }
      }
      for (std::int64_t column = 0; column < in.width; column += kColumns) {
        const int n = static_cast<int>(std::min<std::int64_t>(kColumns, in.width - column));
        const Column* band = scratch.band.data() + c % together;
        add_columns(band, step, x.first.data() + column, x.count.data() + column, x.at.data() + column, x.value.data(),
                    n, in.gain[c], in.bias[c], scratch.columns);
        transpose(scratch.columns[0].row, kLanes, (n + 3) / 4 * 4, kLanes, scratch.result[0], kColumns);
        const std::int64_t at = out + c * plane + row * in.width + column;
        for (int j = 0; j < lanes; ++j) store_result(in, at + j * in.width, n, scratch.result[j]);
      }
    }
  }
}

// A fresh result of many crops costs as much in page faults as in arithmetic.
void use_large_pages(const CropResize& in) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = 1 << 21;
  const auto data = reinterpret_cast<std::uintptr_t>(in.out);
  const std::uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes_of(in)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  (void)in;
}

}  // namespace

void crop_resize(const CropResize& in, int threads) {
  use_large_pages(in);
  // Few crops are cut into strips, so that every thread has work; a strip computes its crop's column weights again.
  const std::int64_t blocks = (in.height + kLanes - 1) / kLanes;
  const std::int64_t wanted = threads > 1 ? (4 * threads + in.crops - 1) / std::max<std::int64_t>(in.crops, 1) : 1;
  const std::int64_t strips = std::min(blocks, wanted);
  const std::int64_t rows = (blocks + strips - 1) / strips * kLanes;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch{};
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < in.crops * strips; ++task) {
      const std::int64_t begin = task % strips * rows, end = std::min(begin + rows, in.height);
      if (begin < end) crop_rows(in, task / strips, begin, end, scratch);
    }
    finish_streams();
  }
}

}  // namespace mtedit
