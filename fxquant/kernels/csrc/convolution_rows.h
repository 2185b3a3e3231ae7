// The walk over a convolution that every instruction set shares. The patches that some places of the
// output read are written one below the other, so that they are the rows of a matrix product; a `Mode`
// multiplies them:
//   kRows                  rows of a tile
//   kTakenOff              what it takes off each byte of x before it multiplies
//   begin(), end()         around the products of a share
//   multiply(x, stride, rows, weight, chunks, sums)
//                          the sums, int32 [kRows][32], of a tile of patches, of which the last may be
//                          anything, with a slab of the weight
#pragma once

#include "activation.h"
#include "convolution.h"
#include "numbers.h"

namespace fxquant {
namespace {

constexpr int64_t kPatchBytes = 1 << 18;  // of patches at a time, which stay in the second cache

// A whole number of chunks, an odd one: rows of an even one would compete for places in the cache.
inline int64_t patch_stride(const Convolution& call) { return (call.chunks() | 1) * kChunk; }

template <class Mode>
int64_t tiles_of_panel(const Convolution& call) {
  const int64_t tiles = kPatchBytes / (patch_stride(call) * Mode::kRows);
  const int64_t all = (call.rows() + Mode::kRows - 1) / Mode::kRows;
  return tiles < 1 ? 1 : tiles < all ? tiles : all;
}

// A whole number of 0 .. 255; 0 of NaN, which stands in a grid whose scale is NaN too.
inline int32_t zero_point_of(const Convolution& call, int64_t grid) {
  const float given = call.zero_points[grid];
  return given >= 0 && given <= 255 ? static_cast<int32_t>(given) : 0;
}

// What the outputs of a slab are made of their sums with, for a sample.
struct Finish {
  const int32_t* taken_off;  // zero point · Σ w
  const float* factors;      // scale of x · scale of w
  const float* bias;
};

// The patches of some rows, and what sums become outputs with, in the memory of a share.
struct ConvolutionMemory {
  uint8_t* patches;
  int32_t* taken_off;  // [grids][padded outputs], as are factors
  float* factors;
  float* bias;  // [padded outputs]

  template <class Mode>
  static int64_t bytes(const Convolution& call) {
    // One chunk more: runs are copied in whole vectors.
    const int64_t patches = tiles_of_panel<Mode>(call) * Mode::kRows * patch_stride(call) + kChunk;
    return patches + (2 * call.grids + 1) * call.padded_outputs() * 4;
  }

  template <class Mode>
  static ConvolutionMemory at(const Convolution& call, uint8_t* memory) {
    const int64_t outputs = call.padded_outputs();
    auto* bias = reinterpret_cast<float*>(memory);
    float* factors = bias + outputs;
    auto* taken_off = reinterpret_cast<int32_t*>(factors + call.grids * outputs);
    ConvolutionMemory made{reinterpret_cast<uint8_t*>(taken_off + call.grids * outputs), taken_off,
                           factors, bias};
    for (int64_t n = 0; n < outputs; ++n) bias[n] = 0;
    if (call.bias) load_floats(call.bias, call.bias_type, 0, call.outputs, bias);
    for (int64_t grid = 0; grid < call.grids; ++grid) {
      const float scale = call.scales[grid];
      const int32_t zero = zero_point_of(call, grid) - Mode::kTakenOff;
      for (int64_t n = 0; n < outputs; ++n) {
        factors[grid * outputs + n] = scale * call.weight_scales[n];
        taken_off[grid * outputs + n] = zero * call.weight_sums[n];
      }
    }
    return made;
  }
};

// Copies a run of bytes; what it writes behind them is written again, or never read.
inline void copy_run(const uint8_t* from, int64_t count, const uint8_t* end, uint8_t* to) {
  if (end - from < count + kChunk) {
    memcpy(to, from, count);
    return;
  }
  // Writes that cross lines of the cache take longer.
  if (count <= kChunk / 2) {
    memcpy(to, from, kChunk / 2);
    return;
  }
  for (int64_t i = 0; i < count; i += kChunk) memcpy(to + i, from + i, kChunk);
}

inline void fill_run(uint8_t value, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += kChunk) memset(to + i, value, kChunk);
}

// Writes `count` places of the kernel's row, which begin at column `column` of a row of x.
inline void write_places(const Convolution& call, const uint8_t* row, int64_t column, int64_t count,
                         uint8_t zero, uint8_t* to) {
  const int64_t width = call.size.width, channels = call.channels;
  const uint8_t* end = call.x + call.batch * call.size.height * width * channels;
  const int64_t before = column < 0 ? (-column < count ? -column : count) : 0;
  const int64_t left = width - column, inside = left < count ? (left > before ? left : before) : count;
  fill_run(zero, before * channels, to);
  if (inside > before) {
    const uint8_t* from = row + (column + before) * channels;
    copy_run(from, (inside - before) * channels, end, to + before * channels);
  }
  fill_run(zero, (count - inside) * channels, to + inside * channels);
}

// Writes the patch that a place of the output reads.
inline void write_patch(const Convolution& call, int64_t sample, int64_t row, int64_t column,
                        uint8_t* to) {
  const int64_t grid = call.grids > 1 ? sample : 0, channels = call.channels;
  const auto zero = static_cast<uint8_t>(zero_point_of(call, grid));
  const uint8_t* image = call.x + sample * call.size.height * call.size.width * channels;
  const int64_t left = column * call.stride.width - call.padding.width;
  const int64_t run = call.kernel.width * channels;
  for (int64_t k = 0; k < call.kernel.height; ++k, to += run) {
    const int64_t y = row * call.stride.height - call.padding.height + k * call.dilation.height;
    if (y < 0 || y >= call.size.height) {
      fill_run(zero, run, to);
      continue;
    }
    const uint8_t* from = image + y * call.size.width * channels;
    if (call.dilation.width == 1) {
      write_places(call, from, left, call.kernel.width, zero, to);
      continue;
    }
    for (int64_t place = 0; place < call.kernel.width; ++place) {
      write_places(call, from, left + place * call.dilation.width, 1, zero, to + place * channels);
    }
  }
}

// Writes the patches of the rows first .. last - 1. What stands behind a patch in its last chunk is
// multiplied by zeros.
inline void write_patches(const Convolution& call, int64_t first, int64_t last, uint8_t* to) {
  const int64_t stride = patch_stride(call), width = call.places.width;
  int64_t column = first % width, row = first / width % call.places.height;
  int64_t sample = first / width / call.places.height;
  for (int64_t at = first; at < last; ++at, to += stride) {
    write_patch(call, sample, row, column, to);
    if (++column < width) continue;
    column = 0;
    if (++row < call.places.height) continue;
    row = 0, ++sample;
  }
}

// Rounds to uint8 as `quantize_uint8` does, but for a multiplication in the place of its division.
inline void round_outputs(const float* v, float reciprocal, float zero_point, uint8_t* q) {
  alignas(64) uint32_t bits[kSlab];
  for (int n = 0; n < kSlab; ++n) bits[n] = clamped_bits(v[n] * reciprocal + zero_point);
  for (int n = 0; n < kSlab; ++n) bits[n] = as_bits(as_float(bits[n]) + 0x1.8p23f);
  for (int n = 0; n < kSlab; ++n) q[n] = static_cast<uint8_t>(bits[n]);
}

// Makes outputs, `count` of a slab from `column` on, of the sums of a row.
inline void finish_row(const Convolution& call, const Finish& finish, const int32_t* sums, int64_t row,
                       int64_t column, int count) {
  const int64_t offset = row * call.outputs + column;
  alignas(64) float v[kSlab], added[kSlab];
  for (int n = 0; n < kSlab; ++n) {
    v[n] = static_cast<float>(sums[n] - finish.taken_off[n]) * finish.factors[n] + finish.bias[n];
  }
  const bool is_whole = count == kSlab;  // copies of a size that compilers know take no time
  if (call.residual) {
    load_floats(call.residual, call.residual_type, offset, is_whole ? kSlab : count, added);
    for (int n = 0; n < (is_whole ? kSlab : count); ++n) v[n] += added[n];
  }
  apply(call.function, v, kSlab);
  if (call.y) {
    if (is_whole) {
      store_floats(v, kSlab, call.y, call.y_type, offset);
    } else {
      store_floats(v, count, call.y, call.y_type, offset);
    }
  }
  if (!call.q) return;
  alignas(64) uint8_t q[kSlab];
  round_outputs(v, 1.0f / *call.q_scale, *call.q_zero_point, q);
  if (is_whole) {
    memcpy(call.q + offset, q, kSlab);
  } else {
    memcpy(call.q + offset, q, count);
  }
}

// Multiplies a slab with the patches of some rows.
template <class Mode>
void convolve_slab(const Convolution& call, const ConvolutionMemory& memory, int64_t slab,
                   int64_t first, int64_t last) {
  // Two, so that outputs are made of one tile's sums while the next is multiplied.
  alignas(64) int32_t sums[2][Mode::kRows * kSlab];
  const int64_t chunks = call.chunks(), stride = patch_stride(call), column = slab * kSlab;
  const int64_t sample_rows = call.places.height * call.places.width;
  const int8_t* weight = call.weight + column * chunks * kChunk;
  const int64_t left = call.outputs - column;
  const int count = left < kSlab ? static_cast<int>(left) : kSlab;
  const auto finish_tile = [&](int64_t tile) {
    const int64_t start = first + tile * Mode::kRows;
    const int64_t end = start + Mode::kRows < last ? start + Mode::kRows : last;
    const int32_t* at = sums[tile % 2];
    for (int64_t row = start; row < end; ++row, at += kSlab) {
      const int64_t grid = call.grids > 1 ? row / sample_rows : 0;
      const int64_t offset = grid * call.padded_outputs() + column;
      const Finish finish{memory.taken_off + offset, memory.factors + offset, memory.bias + column};
      finish_row(call, finish, at, row, column, count);
    }
  };
  const int64_t tiles = (last - first + Mode::kRows - 1) / Mode::kRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t start = tile * Mode::kRows, rows = last - first - start;
    const int height = rows < Mode::kRows ? static_cast<int>(rows) : Mode::kRows;
    Mode::multiply(memory.patches + start * stride, stride, height, weight, static_cast<int>(chunks),
                   sums[tile % 2]);
    if (tile > 0) finish_tile(tile - 1);
  }
  finish_tile(tiles - 1);
}

// Computes a share of the pairs (panel, slab), slabs varying fastest.
template <class Mode>
void convolve_rows(const Convolution& call, Share share, uint8_t* scratch) {
  const auto memory = ConvolutionMemory::at<Mode>(call, scratch);
  const int64_t tiles = (call.rows() + Mode::kRows - 1) / Mode::kRows, slabs = call.slabs();
  const int64_t most = tiles_of_panel<Mode>(call), panels = (tiles + most - 1) / most;
  const int64_t units = panels * slabs;
  int64_t unit = units * share.number / share.team;
  const int64_t end = units * (share.number + 1) / share.team;
  Mode::begin();
  while (unit < end) {
    const int64_t panel = unit / slabs, first = tiles * panel / panels * Mode::kRows;
    const int64_t next = tiles * (panel + 1) / panels * Mode::kRows;
    const int64_t last = next < call.rows() ? next : call.rows();
    write_patches(call, first, last, memory.patches);
    for (; unit < end && unit / slabs == panel; ++unit) {
      convolve_slab<Mode>(call, memory, unit % slabs, first, last);
    }
  }
  Mode::end();
}

template <class Mode>
int64_t convolution_bytes(const Convolution& call) {
  return ConvolutionMemory::bytes<Mode>(call);
}

// For modes that need nothing around their products.
struct PlainDots {
  static constexpr int kTakenOff = 0;

  static void begin() {}
  static void end() {}
};

}  // namespace
}  // namespace fxquant
