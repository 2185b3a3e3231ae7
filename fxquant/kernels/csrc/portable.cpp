// Plain C++ for any CPU: everything is multiplied in float32. Products of int8 values are exact
// there, as the sums of a group stay below 2^24.
#include "blocked.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kRows = 4;   // of a tile
constexpr int kSlice = 8;  // outputs that stay in registers

// q − zero point of a group, [input][64].
inline void decode(const Group& group, int steps, float* to) {
  float zero_points[kColumns];
  for (int n = 0; n < kColumns; ++n) {
    zero_points[n] = group.zero_points ? from_f16(group.zero_points[n]) : 8.0f;
  }
  for (int step = 0; step < steps; ++step) {
    uint32_t lanes[kColumns];
    memcpy(lanes, group.codes + sizeof(lanes) * step, sizeof(lanes));
    for (int k = 0; k < kStep; ++k, to += kColumns) {
      const int shift = 8 * (k % 4) + 4 * (k / 4);
      for (int n = 0; n < kColumns; ++n) {
        to[n] = static_cast<float>(static_cast<int32_t>((lanes[n] >> shift) & 0xf)) - zero_points[n];
      }
    }
  }
}

struct FloatMode {
  using Value = float;
  static constexpr int tile_rows = kRows, speed = 15;
  static constexpr bool sums_may_cancel = false;

  static void prepare_group(const float* x, int size, float* to, int stride, float* scale, float*) {
    for (int k = 0; k < size; k += kStep) memcpy(to + k / kStep * stride, x + k, 4 * kStep);
    *scale = 1;
  }

  template <int R, bool Symmetric>
  static void multiply(const Span& span, float* outputs) {
    multiply_groups<FloatMode, R, Symmetric>(span, outputs);
  }

  template <int R, bool Symmetric>
  static void multiply_group(const Group& group, int steps, const TileGroup& tile,
                             float* outputs) {
    float weights[kMaxGroup * kColumns];
    decode(group, steps, weights);
    for (int column = 0; column < kColumns; column += kSlice) {
      float sums[R][kSlice] = {};
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const float* w = weights + column;
      for (int step = 0; step < steps; ++step, x += kStep * R) {
        for (int k = 0; k < kStep; ++k, w += kColumns) {
          unrolled<R>([&](auto r) {
            unrolled<kSlice>([&](auto n) { sums[r][n] += w[n] * x[kStep * r + k]; });
          });
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < kSlice; ++n) {
          const float scale = tile.scales[r] * from_bf16(group.scales[column + n]);
          outputs[kColumns * r + column + n] += scale * sums[r][n];
        }
      }
    }
  }
};

struct Int8Mode : FloatMode {
  static void prepare_group(const float* x, int size, float* to, int stride, float* scale,
                            float* sum) {
    int8_t q[kMaxGroup];
    prepare_int8(x, size, q, kStep, scale, sum);
    for (int k = 0; k < size; ++k) to[k / kStep * stride + k % kStep] = q[k];
  }
};

}  // namespace

const InstructionSet* portable() {
  static constexpr InstructionSet set{"portable", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows};
  return &set;
}

}  // namespace fxquant
