// float32 from and to bfloat16 and float16, in plain arithmetic that compilers turn into vectors.
// Everything here is private to the file that includes it: each is compiled for other instructions.
#pragma once

#include <cstring>

#include "linear.h"

namespace fxquant {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// The bits of a float clamped to 0 .. 255, NaN to 0. Bits of floats above 0 are in the order of these.
// Masks instead of comparisons, of which compilers make branches that processors guess wrong.
inline uint32_t clamped_bits(float value) {
  const auto bits = static_cast<int32_t>(as_bits(value));
  const int32_t positive = bits & ~(bits >> 31);
  const int32_t below = positive - 0x437f0000;  // 255
  const int32_t is_nan = (0x7f800000 - positive) >> 31;
  return static_cast<uint32_t>((0x437f0000 + (below & (below >> 31))) & ~is_nan);
}

inline float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

inline float from_f16(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const float value = as_float(magnitude) * 0x1p112f;  // the difference of the exponents' biases
  const uint32_t infinite = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  return as_float(as_bits(value) | infinite | sign);
}

inline uint16_t to_f16(float value) {
  const uint32_t sign = (as_bits(value) >> 16) & 0x8000;
  const uint32_t bits = as_bits(value) & 0x7fffffff;
  // Below 2^-14 the unit is 2^-24: adding 0.5 leaves the rounded multiple in the last bits.
  const uint32_t tiny = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  const uint32_t finite = bits < 0x38800000 ? tiny : normal;
  const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  return static_cast<uint16_t>(sign | (bits >= 0x477ff000 ? special : finite));
}

inline void load_floats(const void* from, Float type, int64_t offset, int64_t count, float* to) {
  if (type == Float::f32) {
    memcpy(to, static_cast<const float*>(from) + offset, sizeof(float) * count);
  } else if (type == Float::bf16) {
    const uint16_t* bits = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(bits[i]);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = from_f16(bits[i]);
  }
}

inline void store_floats(const float* from, int count, void* to, Float type, int64_t offset) {
  if (type == Float::f32) {
    memcpy(static_cast<float*>(to) + offset, from, sizeof(float) * count);
  } else if (type == Float::bf16) {
    uint16_t* bits = static_cast<uint16_t*>(to) + offset;
#ifdef FXQUANT_AVX512_BF16
    for (; count >= 16; count -= 16, from += 16, bits += 16) {
      const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), rounded);
    }
#endif
    for (int i = 0; i < count; ++i) bits[i] = to_bf16(from[i]);
  } else {
    uint16_t* bits = static_cast<uint16_t*>(to) + offset;
    for (int i = 0; i < count; ++i) bits[i] = to_f16(from[i]);
  }
}

}  // namespace
}  // namespace fxquant
