// Scaled dot product attention, softmax(q · kᵀ · scale + mask) · v: what is asked for.
#pragma once

#include "linear.h"

namespace fxquant {

// Matrices [batch][heads][rows][columns]: the columns of a row lie together, the rest anywhere.
struct Matrices {
  uint8_t* data;
  int64_t batch_stride, head_stride, row_stride;  // elements
};

enum class MaskType : int { none, boolean, f32, bf16, f16 };

// [batch][heads][queries][keys]; a stride is 0 where the mask has one for all.
struct Mask {
  const uint8_t* data;
  MaskType type;  // of boolean ones, true takes part
  int64_t batch_stride, head_stride, row_stride, column_stride;
};

struct Attention {
  Matrices q, k, v, y;
  Float type;  // of all four
  Mask mask;
  int64_t batch, heads, key_heads;  // `heads / key_heads` heads in a row share keys and values
  int64_t queries, keys, width, value_width;
  bool causal;  // query i sees the keys 0 .. i
  float scale;
  int threads;

  int64_t group() const { return heads / key_heads; }
  // Of one head of keys: the queries of all heads that share it.
  int64_t rows() const { return group() * queries; }
  // Rows are taken in chunks, which share what is made of a block of keys.
  static constexpr int64_t kChunk = 192;
  int64_t chunks() const { return (rows() + kChunk - 1) / kChunk; }
  int64_t units() const { return batch * key_heads * chunks(); }
};

// Computes with all threads; false when memory runs out.
bool attention(const Attention& call, const InstructionSet& set);

}  // namespace fxquant
