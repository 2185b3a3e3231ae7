// The search for each group's range, which every instruction set compiles for itself, with vectors
// of kWidth floats. Sums have sixteen lanes in all of them, added up in one order, so that all find
// the same bits.
#pragma once

#include <cmath>

#include "numbers.h"
#include "rounding.h"
#include "unrolled.h"

namespace fxquant {
namespace {

#if defined(FXQUANT_AVX512)
constexpr int kWidth = 16;
#elif defined(FXQUANT_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vector = float __attribute__((vector_size(4 * kWidth)));
constexpr int kSumLanes = 16, kParts = kSumLanes / kWidth;
constexpr int kAtOnce = kWidth / 4;  // grids whose sums stay in registers together

// As `LEAST_VARIANCE` of fxquant/algorithms/rtn.py.
constexpr float kLeastVariance = 1e-6f;

struct Grid {
  float scale;
  float zero_point;
};

// A group of a row: whole lanes. Behind its columns, values repeat and weights are zero.
struct RoundedGroup {
  const Vector* x;
  const Vector* weights;
  Vector* q;
  int64_t vectors;  // a multiple of kParts
};

// The levels 0 .. highest.
struct AllLevels {
  float highest;

  explicit AllLevels(const Rounding& call) : highest(call.highest()) {}

  // The nearest to a place on a grid.
  Vector nearest(Vector place) const {
    place = place > 0.0f ? place : Vector{};
    place = place < highest ? place : Vector{} + highest;
    return (place + 0x1.8p23f) - 0x1.8p23f;  // rounds half to even
  }

  uint8_t code_of(int level) const { return static_cast<uint8_t>(level); }
};

// Those of a code book.
struct BookLevels {
  float first;
  float middles[kBookLevels - 1], gaps[kBookLevels - 1];  // between one and the next
  uint8_t codes[256] = {};

  explicit BookLevels(const Rounding& call) : first(call.book->levels[0]) {
    for (int i = 0; i < kBookLevels; ++i) {
      codes[call.book->levels[i]] = static_cast<uint8_t>(i);
      if (i == 0) continue;
      const float last = call.book->levels[i - 1], next = call.book->levels[i];
      middles[i - 1] = (last + next) / 2, gaps[i - 1] = next - last;
    }
  }

  // Of two that are as near, the larger one.
  Vector nearest(Vector place) const {
    Vector level = Vector{} + first;
    unrolled<kBookLevels - 1>([&](auto i) {
      level += place >= middles[i] ? Vector{} + gaps[i] : Vector{};
    });
    return level;
  }

  uint8_t code_of(int level) const { return codes[level]; }
};

// Sums in sixteen lanes.
struct Lanes {
  Vector parts[kParts] = {};

  // One half is added to the other, until one lane is left.
  float total() const {
    alignas(64) float lanes[kSumLanes];
    memcpy(lanes, parts, sizeof(lanes));
    unrolled<8>([&](auto i) { lanes[i] += lanes[i + 8]; });
    unrolled<4>([&](auto i) { lanes[i] += lanes[i + 4]; });
    unrolled<2>([&](auto i) { lanes[i] += lanes[i + 2]; });
    return lanes[0] + lanes[1];
  }
};

inline float to_scale(float scale) {
  const float rounded = from_bf16(to_bf16(scale));
  return rounded == 0 ? 1 : rounded;
}

inline float clamped(float value, float low, float high) {
  return std::fmin(std::fmax(value, low), high);
}

// A zero point as it is stored; never -0.0.
inline float to_zero_point(const Rounding& call, float zero_point) {
  if (call.whole) return std::nearbyint(clamped(zero_point, 0.0f, call.highest())) + 0.0f;
  return from_f16(to_f16(clamped(zero_point, -1024.0f, 1024.0f)));
}

inline Grid grid_of_range(const Rounding& call, float low, float high) {
  if (call.symmetric) {
    const float lowest = call.lowest() - call.middle();
    return {to_scale((high > -low ? high : low) / lowest), call.middle()};
  }
  // As `scales_from_range` of numerics/weights.py: no overflow, no zero point too far for float16.
  const float farther = std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
  if (call.whole || farther > (high / 2 - low / 2) * 8.0f) {
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
  }
  const float scale = to_scale((high / 2 - low / 2) / (call.highest() / 2));
  return {scale, to_zero_point(call, 0.0f - low / scale)};
}

// The root of the weighted squared error of some grids.
template <int Count, class Levels>
void measure(const RoundedGroup& group, const Levels& levels, const Grid* grids, float* errors) {
  Lanes sums[Count];
  float reciprocals[Count];
  for (int c = 0; c < Count; ++c) reciprocals[c] = 1.0f / grids[c].scale;
  for (int64_t i = 0; i < group.vectors; i += kParts) {
    unrolled<kParts>([&](auto part) {
      const Vector x = group.x[i + part], weights = group.weights[i + part];
      unrolled<Count>([&](auto c) {
        const Vector place = x * reciprocals[c] + grids[c].zero_point;
        const Vector distance = levels.nearest(place) - place;
        sums[c].parts[part] += distance * distance * weights;
      });
    });
  }
  for (int c = 0; c < Count; ++c) {
    errors[c] = std::sqrt(sums[c].total()) * std::fabs(grids[c].scale);
  }
}

// As `quantize_affine`: dividing rounds differently from a product with the reciprocal.
template <class Levels>
void set_levels(const RoundedGroup& group, const Levels& levels, const Grid& grid) {
  for (int64_t i = 0; i < group.vectors; ++i) {
    group.q[i] = levels.nearest(group.x[i] / grid.scale + grid.zero_point);
  }
}

// The least-squares scale for the levels of `group`, counted from `origin`; `former` stays where it
// is undefined, or the levels' sum of squares is not above `least`.
inline float fitted_scale(const RoundedGroup& group, float origin, float former, float least = 0) {
  Lanes along, across;
  for (int64_t i = 0; i < group.vectors; i += kParts) {
    unrolled<kParts>([&](auto part) {
      const Vector level = group.q[i + part] - origin, weighted = group.weights[i + part] * level;
      along.parts[part] += weighted * group.x[i + part];
      across.parts[part] += weighted * level;
    });
  }
  const float squares = across.total(), scale = along.total() / squares;
  return to_scale(squares > least && std::isfinite(scale) && scale != 0 ? scale : former);
}

// The least-squares grid for the levels of `group`. Of whole zero points, the scale is fitted once
// more to the rounded one.
inline Grid refitted(const RoundedGroup& group, const Grid& grid, const Rounding& call) {
  const auto with_zero_point = [&](float zero_point) {
    return Grid{fitted_scale(group, zero_point, grid.scale), zero_point};
  };
  if (call.symmetric) return with_zero_point(grid.zero_point);
  Lanes weights, q, x;
  for (int64_t i = 0; i < group.vectors; i += kParts) {
    unrolled<kParts>([&](auto part) {
      weights.parts[part] += group.weights[i + part];
      q.parts[part] += group.weights[i + part] * group.q[i + part];
      x.parts[part] += group.weights[i + part] * group.x[i + part];
    });
  }
  const float count = weights.total(), mean_q = q.total() / count, mean_x = x.total() / count;
  const float scale = fitted_scale(group, mean_q, grid.scale, kLeastVariance * count);
  const float zero_point = to_zero_point(call, mean_q - mean_x / scale);
  return call.whole ? with_zero_point(zero_point) : Grid{scale, zero_point};
}

template <class Levels>
Grid best_grid(const Rounding& call, const RoundedGroup& group, const Levels& levels, float low,
               float high) {
  Grid grids[kMostRanges];
  float errors[kMostRanges] = {};
  int best = 0;
  for (int i = 0; i < call.clip_ratio_count; ++i) {
    const float ratio = std::fabs(call.clip_ratios[i]);
    grids[i] = grid_of_range(call, low * ratio, high * ratio);
    if (call.clip_ratios[i] < 0) grids[i].scale = -grids[i].scale;
  }
  int done = 0;
  for (; done + kAtOnce <= call.clip_ratio_count; done += kAtOnce) {
    measure<kAtOnce>(group, levels, grids + done, errors + done);
  }
  for (; done < call.clip_ratio_count; ++done) measure<1>(group, levels, grids + done, errors + done);
  for (int i = 1; i < call.clip_ratio_count; ++i) best = errors[i] < errors[best] ? i : best;

  Grid grid = grids[best];
  float error = errors[best];
  for (int i = 0; i < call.refits; ++i) {
    set_levels(group, levels, grid);
    const Grid other = refitted(group, grid, call);
    float other_error;
    measure<1>(group, levels, &other, &other_error);
    if (!(other_error < error)) return grid;
    grid = other, error = other_error;
  }
  set_levels(group, levels, grid);
  return grid;
}

// Fills the weights of a group's columns; where none counts, all count alike.
inline void load_weights(const float* importance, int64_t count, int64_t padded, float* weights) {
  float total = 0;
  for (int64_t k = 0; k < count; ++k) {
    weights[k] = importance ? importance[k] : 1;
    total += weights[k];
  }
  if (!(total > 0)) {
    for (int64_t k = 0; k < count; ++k) weights[k] = 1;
  }
  for (int64_t k = count; k < padded; ++k) weights[k] = 0;
}

template <class Better>
float extreme_of(const RoundedGroup& group, const Better& better) {
  Vector found = group.x[0];
  for (int64_t i = 1; i < group.vectors; ++i) {
    found = better(group.x[i], found) ? group.x[i] : found;
  }
  float result = found[0];
  for (int i = 1; i < kWidth; ++i) result = better(found[i], result) ? found[i] : result;
  return result;
}

// Packs the codes of a row without gaps, lowest bit first; the bits behind the last are 0.
inline void pack_row(const uint8_t* codes, int64_t columns, int bits, uint8_t* packed) {
  constexpr int kChunk = 8;  // codes fill whole bytes in every width
  for (int64_t k = 0; k < columns; k += kChunk) {
    const int64_t rest = columns - k, count = rest < kChunk ? rest : kChunk;
    uint64_t word = 0;
    for (int64_t i = 0; i < count; ++i) word |= uint64_t{codes[k + i]} << (i * bits);
    const int64_t bytes = (count * bits + 7) / 8;
    for (int64_t i = 0; i < bytes; ++i) *packed++ = static_cast<uint8_t>(word >> (8 * i));
  }
}

template <class Levels>
void round_rows_to(const Rounding& call, int64_t first, int64_t last, uint8_t* scratch) {
  const Levels levels(call);
  const int64_t room = (call.group_size + kSumLanes - 1) / kSumLanes * kSumLanes;
  auto* x = reinterpret_cast<float*>(scratch);
  float* weights = x + room;
  float* q = weights + room;
  auto* codes = reinterpret_cast<uint8_t*>(q + room);  // of a row
  const int64_t groups = call.groups(), bytes = call.row_bytes();
  int64_t weights_of = -1;  // the size of the group whose weights are loaded, if all are alike
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = g * call.group_size, rest = call.columns - start;
      const int64_t count = rest < call.group_size ? rest : call.group_size;
      const int64_t padded = (count + kSumLanes - 1) / kSumLanes * kSumLanes;
      load_floats(call.weight, call.type, row * call.columns + start, count, x);
      for (int64_t k = count; k < padded; ++k) x[k] = x[count - 1];
      if (call.importance) {
        load_weights(call.importance + start, count, padded, weights);
      } else if (weights_of != count) {
        load_weights(nullptr, count, padded, weights);
        weights_of = count;
      }
      const auto vectors = [](float* from) { return reinterpret_cast<Vector*>(from); };
      const RoundedGroup group{vectors(x), vectors(weights), vectors(q), padded / kWidth};
      const float low = extreme_of(group, [](auto one, auto other) { return one < other; });
      const float high = extreme_of(group, [](auto one, auto other) { return one > other; });
      const Grid grid = best_grid(call, group, levels, low, high);
      call.scales[row * groups + g] = grid.scale;
      call.zero_points[row * groups + g] = grid.zero_point;
      for (int64_t k = 0; k < count; ++k) {
        codes[start + k] = levels.code_of(static_cast<int>(q[k]));
      }
    }
    pack_row(codes, call.columns, call.bits, call.packed + row * bytes);
  }
}

void round_rows(const Rounding& call, int64_t first, int64_t last, uint8_t* scratch) {
  const auto rows = call.book ? round_rows_to<BookLevels> : round_rows_to<AllLevels>;
  rows(call, first, last, scratch);
}

}  // namespace
}  // namespace fxquant
