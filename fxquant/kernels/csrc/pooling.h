// The largest value of each window of an image in channels-last memory: what is asked for.
#pragma once

#include "convolution.h"

namespace fxquant {

struct Pooling {
  const void* x;  // [batch][size.height][size.width][channels]
  Float type;     // of x and y
  int64_t batch, channels;
  Pair size, kernel, stride, dilation;
  Pair padding;  // before the first row and column; what is padded counts as nothing
  Pair places;   // of the output; each window has one place of x at least
  void* y;       // [batch][places.height][places.width][channels]
  int threads;
};

void pool_largest(const Pooling& call);

}  // namespace fxquant
