// Norms for the `Floats` of any CPU: a row is read once and stays in the nearest cache. Its mean is
// taken off before squares are summed, so that nothing is lost where the mean is large.
#pragma once

#include <cmath>

#include "norm.h"
#include "numbers.h"

namespace fxquant {
namespace {

inline int64_t norm_columns(const Norm& call) {
  return (call.columns + kFloats - 1) / kFloats * kFloats;
}

// Memory of one thread: a row, the other row of a sum, the weight and the bias.
int64_t norm_scratch_bytes(const Norm& call) {
  return static_cast<int64_t>(4 * sizeof(float)) * norm_columns(call);
}

// x as it would be stored and read again.
inline void round_to(Float type, float* x, int64_t count) {
  if (type == Float::bf16) {
    for (int64_t i = 0; i < count; ++i) x[i] = from_bf16(to_bf16(x[i]));
  } else if (type == Float::f16) {
    for (int64_t i = 0; i < count; ++i) x[i] = from_f16(to_f16(x[i]));
  }
}

// Σ (x − mean)²
inline float squares_of(const float* x, int64_t count, float mean) {
  Floats sum = all_floats(0);
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const Floats rest = subtract(load_floats_at(x + i), all_floats(mean));
    sum = fma(rest, rest, sum);
  }
  float total = sum_of(sum);
  for (; i < count; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total;
}

inline float mean_of(const float* x, int64_t columns, int64_t count) {
  Floats sum = all_floats(0);
  for (int64_t i = 0; i < columns; i += kFloats) sum = add(sum, load_floats_at(x + i));
  return sum_of(sum) / static_cast<float>(count);
}

void norm_rows(const Norm& call, int64_t first, int64_t last, uint8_t* memory) {
  const int64_t columns = norm_columns(call), count = call.columns;
  float* x = reinterpret_cast<float*>(memory);
  float *other = x + columns, *weight = other + columns, *bias = weight + columns;
  memset(memory, 0, norm_scratch_bytes(call));  // no bias is one of 0
  load_floats(call.weight, call.type, 0, count, weight);
  if (call.bias) load_floats(call.bias, call.type, 0, count, bias);
  for (int64_t row = first; row < last; ++row) {
    load_floats(call.x, call.type, row * count, count, x);
    if (call.residual) {
      load_floats(call.residual, call.type, row * count, count, other);
      for (int64_t i = 0; i < columns; i += kFloats) {
        store_floats_at(x + i, add(load_floats_at(x + i), load_floats_at(other + i)));
      }
      round_to(call.type, x, count);
      if (call.sums) {
        store_floats(x, static_cast<int>(count), call.sums, call.type, row * count);
      }
    }
    const float mean = call.is_rms ? 0.0f : mean_of(x, columns, count);
    const float variance = squares_of(x, count, mean) / static_cast<float>(count);
    const float factor = 1.0f / std::sqrt(variance + call.epsilon);
    for (int64_t i = 0; i < columns; i += kFloats) {
      const Floats rest = subtract(load_floats_at(x + i), all_floats(mean));
      store_floats_at(x + i, times(rest, all_floats(factor)));
    }
    if (call.is_rms) round_to(call.type, x, count);
    for (int64_t i = 0; i < columns; i += kFloats) {
      const Floats value = times(load_floats_at(x + i), load_floats_at(weight + i));
      store_floats_at(x + i, add(value, load_floats_at(bias + i)));
    }
    store_floats(x, static_cast<int>(count), call.y, call.type, row * count);
    // Behind the last column the mean was taken off, too.
    for (int64_t i = count; i < columns; ++i) x[i] = 0;
  }
}

}  // namespace
}  // namespace fxquant
