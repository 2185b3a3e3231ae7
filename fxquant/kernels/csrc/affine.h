// Floats rounded to uint8 with scales known before, and back: x ≈ scale · (q − zero point).
#pragma once

#include "linear.h"

namespace fxquant {

struct Affine {
  void* x;     // [rows, columns] of `type`: read by one function, written by the other
  Float type;
  uint8_t* q;  // [rows, columns]
  int64_t rows;
  int64_t columns;
  const float* scales;       // [columns], or one
  const float* zero_points;  // whole numbers, as many
  bool one_grid;             // whether there is one scale and zero point for all columns
  int threads;
};

// q = x / scale + zero point, rounded to the nearest even integer and clamped to 0 .. 255; NaN gives 0.
void quantize_uint8(const Affine& call);

// x = scale · (q − zero point), in the type of x.
void dequantize_uint8(const Affine& call);

}  // namespace fxquant
