// One float32, for any CPU: see floats_avx2.h. Compilers make what vectors they have of it.
#pragma once

#include "numbers.h"

namespace fxquant {
namespace {

using Floats = float;
constexpr int kFloats = 1, kTileRows = 4, kTileVectors = 4;

inline Floats load_floats_at(const float* at) { return *at; }
inline void store_floats_at(float* at, Floats a) { *at = a; }
inline Floats all_floats(float a) { return a; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats times(Floats a, Floats b) { return a * b; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smallest(Floats a, Floats b) { return a < b ? a : b; }
inline Floats divide(Floats a, Floats b) { return a / b; }
inline Floats power_of_two(Floats x) { return as_float((as_bits(x) << 23) + 0x3f800000); }
inline float sum_of(Floats a) { return a; }
inline float largest_of(Floats a) { return a; }

}  // namespace
}  // namespace fxquant
