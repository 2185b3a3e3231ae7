// Attention for the `Floats` of any CPU, one block of keys after another: scores of a tile of rows,
// their exponentials against the largest so far, and the sum of values, all in the nearest caches.
// What a row gives depends neither on the batch nor on the threads.
#pragma once

#include <cmath>

#include "activation.h"
#include "attention.h"
#include "numbers.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int64_t kBlock = 128;   // keys
constexpr int64_t kFewRows = 12;  // for so many it does not pay to transpose keys

inline int64_t padded(int64_t count) { return (count + kFloats - 1) / kFloats * kFloats; }

// Memory of one thread, in floats.
struct Workspace {
  float* queries;  // [row][padded width], scaled
  float* sums;     // [row][padded value width]: of exponentials times values
  float* largest;  // [row]: of the scores so far
  float* totals;   // [row]: of exponentials so far
  float* scores;   // [row of a tile][kBlock]
  float* keys;     // [input][kBlock], or [key][padded width]
  float* values;   // [key][padded value width]
  float* row;      // [width]: a key before it is transposed

  static int64_t size(const Attention& call) {
    const int64_t width = padded(call.width), value_width = padded(call.value_width);
    return Attention::kChunk * (width + value_width + 2) + kTileRows * kBlock +
           kBlock * (width + value_width) + width;
  }

  Workspace(const Attention& call, float* memory) {
    const int64_t width = padded(call.width), value_width = padded(call.value_width);
    queries = memory;
    sums = queries + Attention::kChunk * width;
    largest = sums + Attention::kChunk * value_width;
    totals = largest + Attention::kChunk;
    scores = totals + Attention::kChunk;
    keys = scores + kTileRows * kBlock;
    values = keys + kBlock * width;
    row = values + kBlock * value_width;
  }
};

// Some rows of one head of keys, in one batch.
struct Chunk {
  int64_t batch, key_head, first, count;

  int64_t head(const Attention& call, int64_t row) const {
    return key_head * call.group() + (first + row) / call.queries;
  }

  int64_t query(const Attention& call, int64_t row) const { return (first + row) % call.queries; }
};

inline int64_t place(const Matrices& matrices, int64_t batch, int64_t head, int64_t row) {
  return batch * matrices.batch_stride + head * matrices.head_stride + row * matrices.row_stride;
}

// Adds a · b to c: a has R rows of `inner` inputs, b `inner` rows of `columns`, whole registers.
template <int R, int V>
FXQUANT_INLINE void add_product_at(const float* a, int64_t a_stride, const float* b,
                                   int64_t b_stride, int64_t inner, float* c, int64_t c_stride) {
  Floats sums[R][V];
  unrolled<R>([&](auto r) {
    unrolled<V>([&](auto v) { sums[r][v] = load_floats_at(c + r * c_stride + v * kFloats); });
  });
  for (int64_t k = 0; k < inner; ++k, b += b_stride) {
    Floats factors[V];
    unrolled<V>([&](auto v) { factors[v] = load_floats_at(b + v * kFloats); });
    unrolled<R>([&](auto r) {
      const Floats value = all_floats(a[r * a_stride + k]);
      unrolled<V>([&](auto v) { sums[r][v] = fma(factors[v], value, sums[r][v]); });
    });
  }
  unrolled<R>([&](auto r) {
    unrolled<V>([&](auto v) { store_floats_at(c + r * c_stride + v * kFloats, sums[r][v]); });
  });
}

template <int R>
void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t inner,
                 float* c, int64_t c_stride, int64_t columns) {
  // Few rows take more columns at once, so that enough sums are on their way.
  constexpr int kVectors = R == 1 ? 8 : R == 2 ? 4 : kTileVectors;
  constexpr int kStep = kVectors * kFloats;
  int64_t n = 0;
  for (; n + kStep <= columns; n += kStep) {
    add_product_at<R, kVectors>(a, a_stride, b + n, b_stride, inner, c + n, c_stride);
  }
  for (; n < columns; n += kFloats) {
    add_product_at<R, 1>(a, a_stride, b + n, b_stride, inner, c + n, c_stride);
  }
}

// Products of R rows with N rows of keys, along the inputs of both.
template <int R, int N>
FXQUANT_INLINE void dot_products_at(const float* queries, int64_t width, const float* keys,
                                    int64_t key_stride, float* scores) {
  Floats sums[R][N];
  unrolled<R>([&](auto r) { unrolled<N>([&](auto n) { sums[r][n] = all_floats(0); }); });
  for (int64_t k = 0; k < width; k += kFloats) {
    unrolled<N>([&](auto n) {
      const Floats factor = load_floats_at(keys + n * key_stride + k);
      unrolled<R>([&](auto r) {
        sums[r][n] = fma(load_floats_at(queries + r * width + k), factor, sums[r][n]);
      });
    });
  }
  unrolled<R>([&](auto r) {
    unrolled<N>([&](auto n) { scores[r * kBlock + n] = sum_of(sums[r][n]); });
  });
}

template <int R>
void dot_products(const float* queries, int64_t width, const float* keys, int64_t key_stride,
                  int64_t count, float* scores) {
  constexpr int kKeys = R < 8 ? 8 / R : 1;  // about eight sums on their way
  int64_t key = 0;
  for (; key + kKeys <= count; key += kKeys) {
    dot_products_at<R, kKeys>(queries, width, keys + key * key_stride, key_stride, scores + key);
  }
  for (; key < count; ++key) {
    dot_products_at<R, 1>(queries, width, keys + key * key_stride, key_stride, scores + key);
  }
}

// Asks for a row that is read some turns later: rows lie far apart, and no CPU guesses them.
inline void fetch_row(const Matrices& from, Float type, int64_t place, int64_t width) {
  constexpr int64_t kAhead = 8, kLine = 64;
  const int64_t bytes = type == Float::f32 ? 4 : 2;
  const uint8_t* at = from.data + (place + kAhead * from.row_stride) * bytes;
  for (int64_t line = 0; line < width * bytes; line += kLine) __builtin_prefetch(at + line);
}

// Rows as float32, each padded with zeros, in `to`.
inline void copy_rows(const Matrices& from, Float type, int64_t place, int64_t count, int64_t width,
                      float* to) {
  const int64_t stride = padded(width);
  for (int64_t row = 0; row < count; ++row, to += stride, place += from.row_stride) {
    fetch_row(from, type, place, width);
    load_floats(from.data, type, place, width, to);
    for (int64_t k = width; k < stride; ++k) to[k] = 0;
  }
}

// Rows that are read once: where they lie, if that is how they are needed, else copied.
inline const float* rows_or_copy(const Matrices& from, Float type, int64_t place, int64_t count,
                                 int64_t width, float* memory, int64_t* stride) {
  if (type == Float::f32 && width % kFloats == 0) {
    *stride = from.row_stride;
    return reinterpret_cast<const float*>(from.data) + place;
  }
  *stride = padded(width);
  copy_rows(from, type, place, count, width, memory);
  return memory;
}

// Keys of a block as columns [input][kBlock]; those behind `count`, up to a register, are 0.
inline void transpose_keys(const Attention& call, int64_t place, int64_t count, float* row,
                           float* to) {
  for (int64_t key = 0; key < padded(count); ++key, place += call.k.row_stride) {
    if (key < count) {
      fetch_row(call.k, call.type, place, call.width);
      load_floats(call.k.data, call.type, place, call.width, row);
    } else {
      memset(row, 0, sizeof(float) * call.width);
    }
    for (int64_t k = 0; k < call.width; ++k) to[k * kBlock + key] = row[k];
  }
}

inline void mask_boolean(const uint8_t* mask, int64_t stride, int64_t count, float* scores) {
  const float hidden = -INFINITY;
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) scores[j] = mask[j] ? scores[j] : hidden;
  } else {
    for (int64_t j = 0; j < count; ++j) scores[j] = mask[j * stride] ? scores[j] : hidden;
  }
}

inline void mask_floats(const Mask& mask, int64_t place, int64_t count, float* scores) {
  const Float type = mask.type == MaskType::f32    ? Float::f32
                     : mask.type == MaskType::bf16 ? Float::bf16
                                                   : Float::f16;
  float values[kBlock];
  if (mask.column_stride == 1) {
    load_floats(mask.data, type, place, count, values);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      load_floats(mask.data, type, place + j * mask.column_stride, 1, values + j);
    }
  }
  for (int64_t j = 0; j < count; ++j) scores[j] += values[j];
}

// The scores of one row with `count` keys from `key` on: masked, and -inf behind the last.
inline void mask_row(const Attention& call, const Chunk& chunk, int64_t row, int64_t key,
                     int64_t count, float* scores) {
  const int64_t query = chunk.query(call, row);
  const Mask& mask = call.mask;
  if (mask.type != MaskType::none) {
    const int64_t place = chunk.batch * mask.batch_stride +
                          chunk.head(call, row) * mask.head_stride + query * mask.row_stride +
                          key * mask.column_stride;
    if (mask.type == MaskType::boolean) {
      mask_boolean(mask.data + place, mask.column_stride, count, scores);
    } else {
      mask_floats(mask, place, count, scores);
    }
  }
  int64_t seen = count;
  if (call.causal && query + 1 - key < seen) seen = query + 1 > key ? query + 1 - key : 0;
  for (int64_t j = seen; j < padded(count); ++j) scores[j] = -INFINITY;
}

// Makes scores exponentials against the largest so far; what was summed before is scaled to it.
inline void soften(int64_t count, float* scores, float* largest_so_far, float* total, float* sums,
                   int64_t width) {
  Floats most = load_floats_at(scores);
  for (int64_t j = kFloats; j < count; j += kFloats) {
    most = largest(most, load_floats_at(scores + j));
  }
  const float before = *largest_so_far, found = largest_of(most);
  const float now = found > before ? found : before;
  const float base = now == -INFINITY ? 0.0f : now;  // no key was seen yet
  Floats sum = all_floats(0);
  for (int64_t j = 0; j < count; j += kFloats) {
    const Floats below = subtract(load_floats_at(scores + j), all_floats(base));
    const Floats power = exp2_of(times(below, all_floats(kLog2e)));
    store_floats_at(scores + j, power);
    sum = add(sum, power);
  }
  if (now != before) {
    const float factor = std::exp2((before - base) * kLog2e);
    *total *= factor;
    for (int64_t d = 0; d < width; d += kFloats) {
      store_floats_at(sums + d, times(load_floats_at(sums + d), all_floats(factor)));
    }
    *largest_so_far = now;
  }
  *total += sum_of(sum);
}

struct Block {
  int64_t key, count;
  const float* keys;
  int64_t key_stride;
  bool is_transposed;
  const float* values;
  int64_t value_stride;
};

template <int R>
void attend_tile(const Attention& call, const Chunk& chunk, const Workspace& work,
                 const Block& block, int64_t row) {
  const int64_t width = padded(call.width), value_width = padded(call.value_width);
  const int64_t count = padded(block.count);
  const float* queries = work.queries + row * width;
  if (block.is_transposed) {
    for (int r = 0; r < R; ++r) memset(work.scores + r * kBlock, 0, sizeof(float) * count);
    add_product<R>(queries, width, block.keys, kBlock, call.width, work.scores, kBlock, count);
  } else {
    dot_products<R>(queries, width, block.keys, block.key_stride, block.count, work.scores);
  }
  for (int r = 0; r < R; ++r) {
    float* scores = work.scores + r * kBlock;
    mask_row(call, chunk, row + r, block.key, block.count, scores);
    soften(count, scores, work.largest + row + r, work.totals + row + r,
           work.sums + (row + r) * value_width, value_width);
  }
  add_product<R>(work.scores, kBlock, block.values, block.value_stride, block.count,
                 work.sums + row * value_width, value_width, value_width);
}

using AttendTile = void (*)(const Attention&, const Chunk&, const Workspace&, const Block&, int64_t);

template <int R = kTileRows>
AttendTile attend_tile_of(int64_t rows) {
  if (rows >= R) return attend_tile<R>;
  if constexpr (R > 1) return attend_tile_of<R - 1>(rows);
  return nullptr;
}

inline void begin(const Attention& call, const Chunk& chunk, const Workspace& work) {
  const int64_t width = padded(call.width), value_width = padded(call.value_width);
  for (int64_t row = 0; row < chunk.count; ++row) {
    float* to = work.queries + row * width;
    const int64_t from =
        place(call.q, chunk.batch, chunk.head(call, row), chunk.query(call, row));
    fetch_row(call.q, call.type, from, call.width);
    load_floats(call.q.data, call.type, from, call.width, to);
    for (int64_t k = 0; k < call.width; ++k) to[k] *= call.scale;
    for (int64_t k = call.width; k < width; ++k) to[k] = 0;
    work.largest[row] = -INFINITY, work.totals[row] = 0;
  }
  memset(work.sums, 0, sizeof(float) * chunk.count * value_width);
}

inline void finish(const Attention& call, const Chunk& chunk, const Workspace& work) {
  const int64_t value_width = padded(call.value_width);
  for (int64_t row = 0; row < chunk.count; ++row) {
    float* sums = work.sums + row * value_width;
    const float total = work.totals[row];
    const float factor = total == 0 ? 0.0f : 1.0f / total;  // a row that sees no key is 0
    for (int64_t d = 0; d < value_width; ++d) sums[d] *= factor;
    const int64_t to = place(call.y, chunk.batch, chunk.head(call, row), chunk.query(call, row));
    store_floats(sums, static_cast<int>(call.value_width), call.y.data, call.type, to);
  }
}

inline void attend_chunk(const Attention& call, const Chunk& chunk, const Workspace& work) {
  begin(call, chunk, work);
  int64_t keys = call.keys;
  if (call.causal) {
    const int64_t last = chunk.query(call, 0) + chunk.count;  // behind the last query, or beyond
    const int64_t end = last < call.queries ? last : call.queries;
    keys = end < keys ? end : keys;
  }
  Block block{};
  block.is_transposed = chunk.count > kFewRows;
  for (int64_t key = 0; key < keys; key += kBlock) {
    block.key = key, block.count = keys - key < kBlock ? keys - key : kBlock;
    const int64_t from = place(call.k, chunk.batch, chunk.key_head, key);
    const int64_t values = place(call.v, chunk.batch, chunk.key_head, key);
    if (block.is_transposed) {
      transpose_keys(call, from, block.count, work.row, work.keys);
      copy_rows(call.v, call.type, values, block.count, call.value_width, work.values);
      block.keys = work.keys, block.values = work.values;
      block.value_stride = padded(call.value_width);
    } else {
      block.keys = rows_or_copy(call.k, call.type, from, block.count, call.width, work.keys,
                                &block.key_stride);
      block.values = rows_or_copy(call.v, call.type, values, block.count, call.value_width,
                                  work.values, &block.value_stride);
    }
    for (int64_t row = 0; row < chunk.count; row += kTileRows) {
      attend_tile_of(chunk.count - row)(call, chunk, work, block, row);
    }
  }
  finish(call, chunk, work);
}

// Computes the units first .. last - 1; `memory` has `attention_scratch_bytes(call)`.
void attend(const Attention& call, int64_t first, int64_t last, uint8_t* memory) {
  const Workspace work(call, reinterpret_cast<float*>(memory));
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t number = unit % call.chunks(), matrix = unit / call.chunks();
    const int64_t begin = call.rows() * number / call.chunks();
    const int64_t end = call.rows() * (number + 1) / call.chunks();
    attend_chunk(call, {matrix / call.key_heads, matrix % call.key_heads, begin, end - begin}, work);
  }
}

int64_t attention_scratch_bytes(const Attention& call) {
  return static_cast<int64_t>(sizeof(float)) * Workspace::size(call);
}

}  // namespace
}  // namespace fxquant
