// Rounding a weight to 2 to 8 bits with the best range for each group: what is asked for.
#pragma once

#include "linear.h"

namespace fxquant {

constexpr int kMostRanges = 64;  // of a search

// The algorithm is that of fxquant/algorithms/rtn.py, which says why; group by group, in place of
// whole tensors, it needs no memory but the cache's.
struct Rounding {
  const void* weight;  // [rows][columns]
  Float type;
  int64_t rows;
  int64_t columns;
  int64_t group_size;       // up to `columns`; the last group may be short
  int bits;                 // of a code
  const CodeBook* book;     // the levels that codes stand for; null where they are 0 .. `highest()`
  bool symmetric;           // whether every zero point is `middle()`
  bool whole;               // whether the others are levels, too
  const float* importance;  // [columns], or null where all count alike
  const float* clip_ratios;     // of the full range, tried in this order; below 0: the other way round
  int clip_ratio_count;
  int refits;         // at most so many, by least squares
  uint8_t* packed;    // [rows][row_bytes()], lowest bit first
  float* scales;      // [rows][groups], representable in bfloat16
  float* zero_points; // [rows][groups], representable in float16

  float highest() const { return static_cast<float>((1 << bits) - 1); }
  float middle() const { return static_cast<float>(book ? kBookMiddle : 1 << (bits - 1)); }
  float lowest() const { return book ? book->levels[0] : 0; }
  int64_t row_bytes() const { return (columns * bits + 7) / 8; }
  int64_t groups() const { return (columns + group_size - 1) / group_size; }
};

// Memory that one thread needs.
inline int64_t rounding_scratch_bytes(const Rounding& call) {
  constexpr int64_t kAlign = 64;
  const int64_t group = (call.group_size * 4 + kAlign - 1) / kAlign * kAlign;
  return 3 * group + call.columns + kAlign;
}

// Rounds with all threads; false when memory runs out.
bool round_groups(const Rounding& call, const InstructionSet& set, int threads);

}  // namespace fxquant
