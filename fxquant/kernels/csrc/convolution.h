// A convolution of uint8 with an int8 weight, in channels-last memory: what is asked for.
//
// x ≈ scale · (q − zero point), so y = Σ w x = scale of w · scale of x · (Σ w q − zero point · Σ w): the
// sums are exact in int32, and every instruction set rounds what follows in the same order, so that
// all of them give the same bits.
#pragma once

#include "linear.h"

namespace fxquant {

// Outputs that are multiplied together: those of the weight are padded to a multiple.
constexpr int kSlab = 32;
constexpr int kLane = 16;       // outputs that lie together in the weight
constexpr int kChunk = 64;      // inputs that are multiplied together: those of a patch are padded
constexpr int64_t kMostInputs = (int64_t{1} << 31) / (255 * 128);  // whose sums int32 holds

// Of height and width.
struct Pair {
  int64_t height, width;
};

struct Convolution {
  const uint8_t* x;  // [batch][size.height][size.width][channels]
  int64_t batch, channels, outputs;
  Pair size, kernel, stride, dilation;
  Pair padding;  // before the first row and column; what is padded stands for 0
  Pair places;   // of the output

  // int8 [lanes of 16 outputs][inputs() / 4][16][4], with the inputs of a patch in the order of memory:
  // row and column of the kernel, channel. Zeros are padded.
  const int8_t* weight;
  const float* weight_scales;   // [padded_outputs()]
  const int32_t* weight_sums;   // [padded_outputs()], Σ w
  const void* bias;             // [outputs], or null
  Float bias_type;

  const float* scales;       // of x: [grids]
  const float* zero_points;  // whole numbers in 0 .. 255
  int64_t grids;             // 1, or one for each sample of the batch

  const void* residual;  // added before the function: [rows()][outputs], or null
  Float residual_type;
  Function function;
  void* y;  // [rows()][outputs], or null
  Float y_type;
  uint8_t* q;  // the same rounded to uint8, or null
  const float* q_scale;  // one number, as is the zero point
  const float* q_zero_point;

  int64_t rows() const { return batch * places.height * places.width; }
  int64_t inputs() const { return kernel.height * kernel.width * channels; }
  int64_t chunks() const { return (inputs() + kChunk - 1) / kChunk; }
  int64_t slabs() const { return (outputs + kSlab - 1) / kSlab; }
  int64_t padded_outputs() const { return slabs() * kSlab; }
};

// False when memory runs out.
bool convolve(const Convolution& call, const InstructionSet& set, int threads);

}  // namespace fxquant
