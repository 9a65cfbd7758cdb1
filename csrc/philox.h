// Counter-based standard normals: Philox4x32-10 (Salmon et al., SC11) and a Box-Muller bounded in fp32.
// Branch-free, so that loops over it vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mtedit {

// One of the ten rounds, on counter words x, y, z, w.
inline void philox_round(std::uint32_t key_lo, std::uint32_t key_hi, std::uint32_t& x, std::uint32_t& y,
                         std::uint32_t& z, std::uint32_t& w) {
  const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * x;
  const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * z;
  x = static_cast<std::uint32_t>(p1 >> 32) ^ y ^ key_lo;
  y = static_cast<std::uint32_t>(p1);
  z = static_cast<std::uint32_t>(p0 >> 32) ^ w ^ key_hi;
  w = static_cast<std::uint32_t>(p0);
}

inline std::uint32_t float_bits(float f) {
  std::uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bits_float(std::uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// From here on, mtedit_fast/ops/seeded_noise.py (where the fits come from) is followed operation by operation: with
// contraction off the normals are then its own, bit for bit.
template <int N>
inline float horner(float x, const float (&coefficients)[N]) {
  float value = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// ln u for u in (0, 1]: e ln 2 + ln(1 + f), with 1 + f in [sqrt(1/2), sqrt(2)).
inline float log_unit(float u) {
  constexpr float kLog[] = {0.333333283662796f,    -0.25000298023223877f, 0.20001468062400818f, -0.16642247140407562f,
                            0.14202173054218292f,  -0.12972238659858704f, 0.12712307274341583f, -0.08101558685302734f};
  constexpr std::uint32_t kSqrtHalf = 0x3F3504F3u;
  const std::uint32_t bits = float_bits(u) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<std::int32_t>(bits) >> 23);
  const float f = bits_float((bits & 0x7FFFFFu) + kSqrtHalf) - 1.0f;
  const float square = f * f;
  return e * 0.693359375f + (e * -0.00021219444170128554f + horner(f, kLog) * f * square - 0.5f * square + f);
}

// Two normals from two words: sqrt(-2 ln u) (cos 2 pi t, sin 2 pi t), u = (r1 + 1/2) / 2^32, t = r2 / 2^32, |z| < 6.77.
// The angle is reduced to the nearest quarter turn while it is still an integer.
inline void box_muller(std::uint32_t r1, std::uint32_t r2, float& z1, float& z2) {
  constexpr float kSin[] = {-0.166666641831398f, 0.008332748897373676f, -0.0001958794891834259f};
  constexpr float kCos[] = {0.0416666641831398f, -0.0013888300163671374f, 2.454758941894397e-05f};
  const float radius = std::sqrt(-2.0f * log_unit(static_cast<float>(r1) * 0x1p-32f + 0x1p-33f));
  const std::uint32_t rotated = r2 + 0x20000000u;
  const auto remainder = static_cast<std::int32_t>(rotated & 0x3FFFFFFFu) - 0x20000000;
  const float theta = static_cast<float>(remainder) * 1.4629180792671596e-09f;  // 2 pi / 2^32
  const float square = theta * theta;
  const float sine = horner(square, kSin) * square * theta + theta;
  const float cosine = horner(square, kCos) * square * square - 0.5f * square + 1.0f;
  const std::uint32_t quarter = rotated >> 30;
  const float x = quarter & 1 ? sine : cosine;
  const float y = quarter & 1 ? cosine : sine;
  z1 = radius * ((quarter + 1) & 2 ? -x : x);
  z2 = radius * (quarter & 2 ? -y : y);
}

}  // namespace mtedit
