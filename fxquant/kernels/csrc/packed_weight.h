// A weight as callers from outside give it: memory, a shape and numbers, which need not belong together.
#pragma once

#include "codes.h"
#include "linear.h"

namespace fxquant {
namespace {

// A weight [blocks, groups, bytes of a group]; its group size is 0 where there is no such group, or no
// such code book: 0 for integers.
inline Weight weight_of(const void* data, int64_t out, int64_t in, int64_t group_bytes, int64_t bits,
                        bool symmetric, int64_t code_book) {
  Weight weight{static_cast<const uint8_t*>(data), out, in, 0, symmetric, 0};
  if (bits < 2 || bits > 8 || bits == 7) return weight;
  weight.bits = static_cast<int>(bits), weight.book = code_book_of(code_book);
  if (code_book != 0 && (!weight.book || bits != kBookBits || !symmetric)) return weight;
  const int64_t size = (group_bytes - weight.grid_bytes()) * 8 / (NR * bits);
  const bool is_known = size > 0 && size <= kMaxGroup &&
                        size % unit_of(weight.bits) == 0;
  if (is_known) weight.group_size = static_cast<int>(size);
  return weight;
}

inline bool is_sound(const Weight& weight, const int64_t* shape) {
  return weight.out_features > 0 && weight.in_features > 0 && weight.group_size > 0 &&
         weight.blocks() == shape[0] && weight.groups() == shape[1] &&
         weight.group_bytes() == shape[2];
}

}  // namespace
}  // namespace fxquant
