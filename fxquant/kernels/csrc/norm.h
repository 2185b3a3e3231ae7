// x + residual, and its LayerNorm or RMSNorm, row by row: what is asked for.
#pragma once

#include "linear.h"

namespace fxquant {

struct Norm {
  const void* x;         // [rows][columns], as are residual, sums and y
  const void* residual;  // may be null
  const void* weight;    // [columns]
  const void* bias;      // [columns], or null
  Float type;            // of all
  void* sums;  // x + residual, rounded as it is stored; may be null
  void* y;
  int64_t rows, columns;
  bool is_rms;  // without the mean; then a row is rounded before it is multiplied with the weight
  float epsilon;
};

// False when memory runs out.
bool norm(const Norm& call, const InstructionSet& set, int threads);

}  // namespace fxquant
