#include "dtype.h"

#include <cstring>

#include "philox.h"
#include "vectorize.h"

namespace mtedit {
namespace {

inline std::uint16_t to_bfloat16(float f) {
  const std::uint32_t u = float_bits(f);
  const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline float from_bfloat16(std::uint16_t h) { return bits_float(std::uint32_t{h} << 16); }

// fp16 has 10 fraction bits and exponent bias 15. Values below its smallest normal, 2^-14, are rounded by adding 0.5,
// whose last bit weighs 2^-24: the weight of fp16's last subnormal bit.
inline std::uint16_t to_float16(float f) {
  const std::uint32_t u = float_bits(f);
  const std::uint32_t magnitude = u & 0x7FFFFFFFu;
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const std::uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  std::uint32_t h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above round to infinity
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  return static_cast<std::uint16_t>(h | ((u >> 16) & 0x8000u));
}

inline float from_float16(std::uint16_t h) {
  const std::uint32_t magnitude = std::uint32_t{h & 0x7FFFu} << 13;
  const std::uint32_t normal = magnitude + (112u << 23);
  const std::uint32_t subnormal = float_bits(bits_float(magnitude + (113u << 23)) - bits_float(113u << 23));
  std::uint32_t u = magnitude < (1u << 23) ? subnormal : normal;
  u = magnitude >= (31u << 23) ? magnitude + (224u << 23) : u;  // infinity, NaN
  return bits_float(u | (std::uint32_t{h & 0x8000u} << 16));
}

MTEDIT_VECTORIZE void load_bfloat16(const std::uint16_t* in, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = from_bfloat16(in[i]);
}

MTEDIT_VECTORIZE void load_float16(const std::uint16_t* in, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = from_float16(in[i]);
}

MTEDIT_VECTORIZE void store_bfloat16(const float* in, int n, std::uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = to_bfloat16(in[i]);
}

MTEDIT_VECTORIZE void store_float16(const float* in, int n, std::uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = to_float16(in[i]);
}

// What a thread converts next, as a rule: hardware sees no stream in 2 KiB at a time. (It does in fp32's 4.)
inline void prefetch(const std::uint16_t* in, int n) {
#if defined(__GNUC__)
  for (int i = 0; i < n; i += 32) __builtin_prefetch(in + i, 0, 2);
#endif
}

}  // namespace

const float* load(const void* data, DType dtype, std::int64_t offset, int n, float* scratch) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data) + offset;
  const auto* in = static_cast<const std::uint16_t*>(data) + offset;
  prefetch(in + n, n);
  dtype == DType::kBFloat16 ? load_bfloat16(in, n, scratch) : load_float16(in, n, scratch);
  return scratch;
}

void store(void* data, DType dtype, std::int64_t offset, int n, const float* values) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + offset, values, sizeof(float) * n);
    return;
  }
  auto* out = static_cast<std::uint16_t*>(data) + offset;
  dtype == DType::kBFloat16 ? store_bfloat16(values, n, out) : store_float16(values, n, out);
}

}  // namespace mtedit
