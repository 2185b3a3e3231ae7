// The walk over blocks, groups and tiles that every instruction set shares. A `Mode` supplies the
// innermost loops; it has
//   Value                      the type of a prepared value
//   MR                         at most so many rows in a tile
//   speed, sums_may_cancel     see `Kernel`
//   prepare_group(...)         a group of one row, from float32, zeros behind it up to `kLanes`; the
//                              sum is null where nobody reads it
//   prepare_bf16(...)          the same from bfloat16, if Value is that
//   unpacking(weight, tiles)   what unpacks codes before so many tiles are multiplied, or null
//   code_bytes                 of a code unpacked
//   multiply<R, Bytes>(...)    adds the products of a span of groups to the outputs of a tile of R
//                              rows; codes are nibbles, or else bytes (or what `unpacking` made of
//                              them)
//   rows_apart                 whether a row's values of a group follow each other in a tile, rather
//                              than eight of each row in turn
//   begin(...), end()          around the products of a call's share
//   float_tiles                for so many tiles or more, a span is made float32 once for all of them;
//                              0 where it never is. If not 0:
//   float_columns              outputs of a slice of such a span, which stays in the nearest cache
//   unpack_floats<Bytes>(...)  makes the slices of a group
//   multiply_floats<R>(...)    as `multiply`, for a slice, in the same order
// Each output is summed in the same order whatever the number of rows and threads, so a row's
// result does not depend on what else is in its batch.
#pragma once

#include <type_traits>

#include "activation.h"
#include "codes.h"
#include "numbers.h"

namespace fxquant {
namespace {

constexpr int kLanes = 16;         // float32 in a register, at most
// Inputs of a span, whose codes stay in the nearest cache for all tiles: nibbles, and wider ones.
constexpr int kSpanInputs = 512, kWideSpanInputs = kMaxGroup;

struct Group {
  const uint16_t* scales;
  const uint16_t* zero_points;  // null where every zero point is the middle
  const uint8_t* codes;
  int middle;  // of the integers
};

struct TileGroup {
  const uint8_t* values;  // [step][row][8], or [row][step][8] where rows lie apart
  const float* scales;    // [row]
  const float* sums;      // [row]
};

// Consecutive groups of a block, and the values of a tile that they are multiplied with.
struct Span {
  int groups;
  int steps;   // of a group
  int middle;  // of the integers
  const CodeBook* book;  // of nibbles that the mode looks up where it uses them
  bool symmetric;
  int ahead;   // bytes from codes in use to those that memory should bring
  const uint8_t* grid;
  int64_t grid_stride;  // bytes from group to group
  const uint8_t* codes;
  int64_t code_stride;
  TileGroup first;
  int64_t value_stride;  // bytes
  int64_t row_stride;    // rows

  Group group(int i) const {
    const auto* scales = reinterpret_cast<const uint16_t*>(grid + i * grid_stride);
    return {scales, symmetric ? nullptr : scales + NR, codes + i * code_stride, middle};
  }

  TileGroup tile(int i) const {
    return {first.values + i * value_stride, first.scales + i * row_stride,
            first.sums + i * row_stride};
  }
};

// Picks `count` elements of a row out of memory, from column `first` on.
inline void pick_floats(const Call& call, int64_t row, int64_t first, int count, float* to) {
  const int64_t start = call.places.rows[row];
  const int32_t* columns = call.places.columns + first;
  if (call.x_type == Float::f32) {
    const float* x = static_cast<const float*>(call.x) + start;
    for (int k = 0; k < count; ++k) to[k] = x[columns[k]];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(call.x) + start;
  for (int k = 0; k < count; ++k) {
    to[k] = call.x_type == Float::bf16 ? from_bf16(x[columns[k]]) : from_f16(x[columns[k]]);
  }
}

// Prepares a group of int8 values of a row, which are multiplied as they are; zeros follow them.
template <class Value>
inline void pick_int8(const Call& call, int64_t row, int64_t first, int count, int size, Value* to,
                      int stride, float* scale, float* sum) {
  const int8_t* x = static_cast<const int8_t*>(call.x) + call.places.rows[row];
  const int32_t* columns = call.places.columns + first;
  int32_t total = 0;
  int k = 0;
  for (; k + KR <= count; k += KR) {
    int8_t q[KR];
    unrolled<KR>([&](auto j) { q[j] = x[columns[k + j]]; });
    unrolled<KR>([&](auto j) { to[k / KR * stride + j] = q[j], total += q[j]; });
  }
  for (; k < size; k += KR) {
    for (int j = 0; j < KR; ++j) {
      const int8_t q = k + j < count ? x[columns[k + j]] : 0;
      to[k / KR * stride + j] = q, total += q;
    }
  }
  *scale = call.places.scales[row];
  *sum = static_cast<float>(total);
}

// A row of x, where it is going: in a tile of `height` rows.
struct TileRow {
  int64_t number;  // in x
  int row;         // in the tile
  int height;
};

// Prepares a group of one row; `at` is its tile's place in the panel.
template <class Mode>
inline void prepare_row(const Call& call, const Panel& panel, const TileRow& to, int64_t group,
                        int64_t at) {
  const int size = call.weight.group_size, stride = Mode::rows_apart ? KR : to.height * KR;
  const int row_stride = Mode::rows_apart ? size : KR;
  const int64_t columns = call.weight.in_features, rest = columns - group * size;
  const int64_t offset = to.number * columns + group * size;
  auto* values = reinterpret_cast<typename Mode::Value*>(panel.values) + at * size + to.row * row_stride;
  float* sum =
      Mode::sums_may_cancel && call.weight.symmetric ? nullptr : &panel.sums[at + to.row];
  const int count = rest < size ? static_cast<int>(rest) : size;
  if (call.places.scales) {
    return pick_int8(call, to.number, group * size, count, size, values, stride,
                     &panel.scales[at + to.row], &panel.sums[at + to.row]);
  }
  const bool is_whole = !call.places.rows && rest >= size && size % kLanes == 0;
  if constexpr (std::is_same_v<typename Mode::Value, uint16_t>) {
    if (is_whole && call.x_type == Float::bf16) {
      const uint16_t* x = static_cast<const uint16_t*>(call.x) + offset;
      return Mode::prepare_bf16(x, size, values, stride, sum);
    }
  }
  alignas(64) float buffer[kMaxGroup + kLanes];
  const float* x = buffer;
  if (is_whole && call.x_type == Float::f32) {
    x = static_cast<const float*>(call.x) + offset;
  } else {
    if (call.places.rows) {
      pick_floats(call, to.number, group * size, count, buffer);
    } else {
      load_floats(call.x, call.x_type, offset, count, buffer);
    }
    for (int k = count; k < size + kLanes; ++k) buffer[k] = 0;
  }
  Mode::prepare_group(x, size, values, stride, &panel.scales[at + to.row], sum);
}

template <class Mode>
void prepare(const Call& call, const Panel& panel, int64_t first, int64_t last) {
  while (first < last) {
    const int tile = static_cast<int>(first / panel.groups);
    const int64_t begin = first % panel.groups, left = begin + (last - first);
    const int64_t end = left < panel.groups ? left : panel.groups;
    first += end - begin;
    const int64_t start = panel.first_row + panel.tile_start(tile);
    const int height = panel.height(tile);
    // Row after row, as they lie in memory.
    for (int row = 0; row < height; ++row) {
      int64_t at = panel.index(tile, begin);
      for (int64_t g = begin; g < end; ++g, at += height) {
        prepare_row<Mode>(call, panel, {start + row, row, height}, g, at);
      }
    }
  }
}

// For modes that multiply one step after another, and need nothing around that.
struct OneByOne {
  static constexpr bool rows_apart = false;

  static void begin(const Weight&, int) {}
  static void end() {}
};

// For those of them that multiply nibbles and bytes, to which other widths are unpacked.
struct ByteCodes : OneByOne {
  static constexpr int code_bytes = 1, float_tiles = 0;

  static UnpackBytes unpacking(const Weight& weight, int) { return unpacking_of(weight); }
};

// For those of them that multiply one group after another, by `multiply_group<R, Bytes>(...)`.
template <class Mode>
struct GroupByGroup : ByteCodes {
  template <int R, bool Bytes>
  static void multiply(const Span& span, float* outputs) {
    for (int i = 0; i < span.groups; ++i) {
      Mode::template multiply_group<R, Bytes>(span, span.group(i), span.tile(i), outputs);
    }
  }
};

using Multiply = void (*)(const Span&, float* outputs);

template <class Mode, bool Bytes, int R = Mode::MR>
Multiply multiply_by_rows(int rows) {
  if (rows == R) return Mode::template multiply<R, Bytes>;
  if constexpr (R > 1) return multiply_by_rows<Mode, Bytes, R - 1>(rows);
  return nullptr;
}

template <class Mode, int R = Mode::MR>
Multiply multiply_floats_by_rows(int rows) {
  if (rows == R) return Mode::template multiply_floats<R>;
  if constexpr (R > 1) return multiply_floats_by_rows<Mode, R - 1>(rows);
  return nullptr;
}

// What multiplies the tiles of a panel: of its tallest height, and those one row lower.
struct ByHeight {
  int tallest;
  Multiply tall, low;

  template <class Mode>
  static ByHeight of(bool by_nibbles, int tallest) {
    const auto of_rows = by_nibbles ? multiply_by_rows<Mode, false> : multiply_by_rows<Mode, true>;
    return {tallest, of_rows(tallest), of_rows(tallest - 1)};
  }

  template <class Mode>
  static ByHeight of_floats(int tallest) {
    return {tallest, multiply_floats_by_rows<Mode>(tallest),
            multiply_floats_by_rows<Mode>(tallest - 1)};
  }
};

// Some groups of a block, unpacked into `buffer` where the mode wants that.
template <class Mode>
Span span_of(const Weight& weight, int64_t block, int64_t group, int groups, UnpackBytes unpack,
             uint8_t* buffer) {
  Span span{};
  span.groups = groups, span.steps = weight.steps(), span.middle = weight.middle();
  span.book = weight.book;
  span.grid = weight.data + (block * weight.groups() + group) * weight.group_bytes();
  span.grid_stride = weight.group_bytes();
  span.codes = span.grid + weight.grid_bytes(), span.code_stride = span.grid_stride;
  span.symmetric = weight.symmetric, span.ahead = kAhead;
  if (!unpack) return span;
  const int64_t stride = static_cast<int64_t>(weight.group_size) * NR * Mode::code_bytes;
  for (int i = 0; i < groups; ++i) {
    const uint8_t* codes = span.codes + i * span.code_stride;
    unpack(codes, weight.group_size, weight.book, buffer + i * stride);
  }
  span.codes = buffer, span.code_stride = stride, span.ahead = 0;
  return span;
}

// Tiles begin .. end - 1 of a panel, and where their outputs are: float32 [row][64].
struct Tiles {
  const Panel& panel;
  int begin, end;
  float* outputs;
};

// Adds the products of a span that starts with the group numbered `group`, from output `column` of a
// block on.
template <class Mode>
void multiply_tiles(const Tiles& tiles, const ByHeight& multiply, Span span, int64_t group,
                    int column) {
  const int64_t value_bytes = span.steps * KR * sizeof(typename Mode::Value);
  const int first_row = tiles.panel.tile_start(tiles.begin);
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    const int height = tiles.panel.height(tile);
    const int64_t at = tiles.panel.index(tile, group);
    span.first = {tiles.panel.values + at * value_bytes, tiles.panel.scales + at,
                  tiles.panel.sums + at};
    span.value_stride = height * value_bytes, span.row_stride = height;
    float* to = tiles.outputs + (tiles.panel.tile_start(tile) - first_row) * NR + column;
    (height == multiply.tallest ? multiply.tall : multiply.low)(span, to);
  }
}

// The same by way of float32 weights; `floats` has room for those of a span.
template <class Mode>
void multiply_slices(const Tiles& tiles, const ByHeight& multiply, const Weight& weight,
                     const Span& span, int64_t group, float* floats) {
  const auto unpack = has_nibbles(weight) ? Mode::template unpack_floats<false>
                                          : Mode::template unpack_floats<true>;
  const int64_t group_floats = static_cast<int64_t>(weight.group_size) * Mode::float_columns;
  const int64_t slice_floats = span.groups * group_floats;
  for (int i = 0; i < span.groups; ++i) {
    unpack(span.group(i), span.steps, floats + i * group_floats, slice_floats);
  }
  Span slice = span;
  slice.code_stride = group_floats * sizeof(float);
  for (int column = 0; column < NR; column += Mode::float_columns, floats += slice_floats) {
    slice.grid = span.grid + column * sizeof(uint16_t);
    slice.codes = reinterpret_cast<const uint8_t*>(floats);
    multiply_tiles<Mode>(tiles, multiply, slice, group, column);
  }
}

template <class Mode>
void multiply(const Call& call, const Panel& panel, int64_t first, int64_t last) {
  alignas(64) float outputs[MC * NR];
  const Weight& weight = call.weight;
  alignas(64) uint8_t unpacked[kWideSpanInputs * NR * Mode::code_bytes];
  alignas(64) float floats[Mode::float_tiles ? kWideSpanInputs * NR : 1];
  const int tallest = (panel.rows + panel.tiles - 1) / panel.tiles;
  const UnpackBytes unpack = Mode::unpacking(weight, panel.tiles);
  const bool by_nibbles = weight.bits == 4 && !unpack;
  const ByHeight by_codes = ByHeight::of<Mode>(by_nibbles, tallest);
  Mode::begin(weight, tallest);
  while (first < last) {
    const int64_t block = first / panel.tiles;
    const int begin = static_cast<int>(first % panel.tiles);
    const int64_t left = begin + (last - first);
    const int end = left < panel.tiles ? static_cast<int>(left) : panel.tiles;
    first += end - begin;

    const int64_t column = block * NR, columns_left = weight.out_features - column;
    const int columns = columns_left < NR ? static_cast<int>(columns_left) : NR;
    alignas(64) float bias[NR] = {};
    if (call.bias) load_floats(call.bias, call.bias_type, column, columns, bias);
    const int first_row = panel.tile_start(begin), last_row = panel.tile_start(end);
    for (int row = 0; row < last_row - first_row; ++row) {
      memcpy(outputs + row * NR, bias, sizeof(bias));
    }

    const Tiles tiles{panel, begin, end, outputs};
    const bool as_floats = Mode::float_tiles > 0 && end - begin >= Mode::float_tiles;
    const int inputs = by_nibbles && !as_floats ? kSpanInputs : kWideSpanInputs;
    const int span_groups = weight.group_size < inputs ? inputs / weight.group_size : 1;
    for (int64_t g = 0; g < weight.groups(); g += span_groups) {
      const int64_t left = weight.groups() - g;
      const int groups = left < span_groups ? static_cast<int>(left) : span_groups;
      const Span span = span_of<Mode>(weight, block, g, groups, unpack, unpacked);
      if constexpr (Mode::float_tiles > 0) {
        if (as_floats) {
          const ByHeight by_floats = ByHeight::of_floats<Mode>(tallest);
          multiply_slices<Mode>(tiles, by_floats, weight, span, g, floats);
          continue;
        }
      }
      multiply_tiles<Mode>(tiles, by_codes, span, g, 0);
    }
    const int shares = call.is_gated ? 2 : 1;
    for (int row = first_row; row < last_row; ++row) {
      float* y = outputs + (row - first_row) * NR;
      apply(call.function, y, NR / shares);
      if (call.is_gated) multiply_halves(y);
      const int64_t offset = (panel.first_row + row) * call.columns() + column / shares;
      store_floats(y, columns / shares, call.y, call.y_type, offset);
    }
  }
  Mode::end();
}

template <class Mode>
constexpr Kernel kernel_of() {
  return {Mode::MR,       sizeof(typename Mode::Value), Mode::speed,
          Mode::sums_may_cancel, prepare<Mode>,                multiply<Mode>};
}

// How 8-bit integers add to an output: Σ (q − middle) x is exact, and every instruction set rounds
// what follows in the same order, so that all of them give the same bits.
//   asymmetric: (Σ + (middle − zero point) · Σ x) · scale of x · scale
//   symmetric:  Σ · scale of x · scale
inline float int8_product(float sum, float offset, float sum_of_x, float x_scale, float scale,
                          bool symmetric) {
  const float product = symmetric ? sum : sum + offset * sum_of_x;
  return product * x_scale * scale;
}

// Copies a group of one row. The sum is null where nobody reads it.
inline void prepare_float32(const float* x, int size, float* to, int stride, float* sum) {
  float partial[KR] = {};
  for (int k = 0; k < size; k += KR) {
    memcpy(to + k / KR * stride, x + k, 4 * KR);
    for (int j = 0; j < KR; ++j) partial[j] += x[k + j];
  }
  if (!sum) return;
  *sum = ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// The step of a group whose largest magnitude has these bits: max |x| / 127. Not finite: NaN.
inline float int8_step(uint32_t largest) {
  const float step = as_float(largest) / 127.0f;
  if (largest >= 0x7f800000) return as_float(0x7fc00000);
  return step > 0x1p-126f ? step : 0x1p-126f;  // a smaller one has no reciprocal
}

// Rounds a group of one row to int8.
inline void prepare_int8(const float* x, int size, int8_t* to, int stride, float* scale,
                         float* sum) {
  uint32_t largest[KR] = {}, all = 0;
  for (int k = 0; k < size; k += KR) {
    for (int j = 0; j < KR; ++j) {
      const uint32_t magnitude = as_bits(x[k + j]) & 0x7fffffff;
      largest[j] = magnitude > largest[j] ? magnitude : largest[j];
    }
  }
  for (const uint32_t magnitude : largest) all = magnitude > all ? magnitude : all;
  *scale = int8_step(all);
  const float reciprocal = 1.0f / *scale;
  int32_t total = 0;
  for (int k = 0; k < size; k += KR) {
    int8_t q[KR];
    for (int j = 0; j < KR; ++j) {
      // Adding 1.5 · 2^23 rounds to a whole number in the last bits.
      const uint32_t rounded = as_bits(x[k + j] * reciprocal + 0x1.8p23f) - as_bits(0x1.8p23f);
      q[j] = static_cast<int8_t>(rounded);
      total += q[j];
    }
    memcpy(to + k / KR * stride, q, KR);
  }
  *sum = static_cast<float>(total);
}

}  // namespace
}  // namespace fxquant
