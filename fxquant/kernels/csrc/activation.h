// Functions that follow a linear layer, applied to its outputs while they are in the nearest cache.
// In float32 they are within 1e-6 of their values, relative to the larger of these and 1.
#pragma once

#include <cmath>

#include "exponential.h"
#include "linear.h"

namespace fxquant {
namespace {

constexpr float kLog2e = 0x1.715476p0f;

// x / (1 + e^−y)
inline Floats times_sigmoid(Floats x, Floats y) {
  const Floats power = exp2_of(times(y, all_floats(-kLog2e)));
  return divide(x, add(all_floats(1), power));
}

// x · Φ(x) = max(x, 0) − |x| · Φ(−|x|), by the approximation 7.1.26 of Abramowitz and Stegun to
// erfc, whose error is below 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats zero = all_floats(0);
  // Φ of what is cut off is 0 in float32.
  const Floats magnitude = smallest(all_floats(40), largest(subtract(zero, x), x));
  const Floats z = times(magnitude, all_floats(0.70710678f));
  const Floats t = divide(all_floats(1), fma(z, all_floats(0.3275911f), all_floats(1)));
  Floats sum = all_floats(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    sum = fma(sum, t, all_floats(factor));
  }
  const Floats power = exp2_of(times(times(z, z), all_floats(-kLog2e)));
  const Floats tail = times(times(times(sum, t), power), all_floats(0.5f));
  return subtract(largest(zero, x), times(magnitude, tail));
}

// x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2 = x / (1 + e^(−2 · …))
inline Floats gelu_tanh(Floats x) {
  const Floats inner = fma(times(x, x), all_floats(0.044715f), all_floats(1));
  return times_sigmoid(x, times(times(x, inner), all_floats(1.5957691216f)));
}

// `count` is whole registers.
inline void apply(Function function, float* x, int count) {
  switch (function) {
    case Function::none:
      return;
    case Function::relu:
      for (int i = 0; i < count; i += kFloats) {
        store_floats_at(x + i, largest(all_floats(0), load_floats_at(x + i)));
      }
      return;
    case Function::gelu:
      for (int i = 0; i < count; i += kFloats) {
        store_floats_at(x + i, gelu(load_floats_at(x + i)));
      }
      return;
    case Function::gelu_tanh:
      for (int i = 0; i < count; i += kFloats) {
        store_floats_at(x + i, gelu_tanh(load_floats_at(x + i)));
      }
      return;
    case Function::silu:
      for (int i = 0; i < count; i += kFloats) {
        const Floats value = load_floats_at(x + i);
        store_floats_at(x + i, times_sigmoid(value, value));
      }
      return;
    case Function::tanh:
      for (int i = 0; i < count; ++i) x[i] = std::tanh(x[i]);
      return;
  }
}

// Multiplies the first half of a block's outputs by the second.
inline void multiply_halves(float* x) {
  for (int i = 0; i < NR / 2; i += kFloats) {
    store_floats_at(x + i, times(load_floats_at(x + i), load_floats_at(x + NR / 2 + i)));
  }
}

}  // namespace
}  // namespace fxquant
