// Sixteen float32 in a register of AVX-512: see floats_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fxquant {
namespace {

using Floats = __m512;
constexpr int kFloats = 16, kTileRows = 6, kTileVectors = 4;

inline Floats load_floats_at(const float* at) { return _mm512_loadu_ps(at); }
inline void store_floats_at(float* at, Floats a) { _mm512_storeu_ps(at, a); }
inline Floats all_floats(float a) { return _mm512_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smallest(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }

// Inline assembly, because GCC 12 spills accumulators that it manages itself.
inline Floats fma(Floats a, Floats b, Floats c) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}

inline Floats power_of_two(Floats x) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(x), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)));
}

inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest_of(Floats a) { return _mm512_reduce_max_ps(a); }

}  // namespace
}  // namespace fxquant
