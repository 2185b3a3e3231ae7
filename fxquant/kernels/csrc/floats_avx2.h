// Eight float32 in a register of AVX2. The other `floats_*.h` offer the same for their CPUs:
//   kFloats           float32 in a register, `Floats`
//   kTileRows         rows of a tile of sums; kTileVectors: registers of each of its rows
//   fma(a, b, c)      a · b + c, rounded once where the CPU can
//   largest(a, b), smallest(a, b)   b where either is NaN
//   power_of_two(x)   2^n, where x was computed as n + 1.5 · 2^23, n in −127 .. 128 (infinite)
//   sum_of(a)         of its lanes; largest_of(a): the largest of its lanes, none of them NaN
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fxquant {
namespace {

using Floats = __m256;
constexpr int kFloats = 8, kTileRows = 6, kTileVectors = 2;

inline Floats load_floats_at(const float* at) { return _mm256_loadu_ps(at); }
inline void store_floats_at(float* at, Floats a) { _mm256_storeu_ps(at, a); }
inline Floats all_floats(float a) { return _mm256_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats largest(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smallest(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }

inline Floats power_of_two(Floats x) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}

inline float sum_of(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest_of(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace
}  // namespace fxquant
