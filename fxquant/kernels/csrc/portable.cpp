// Plain C++ for any CPU: everything is multiplied in float32. Products of int8 values are exact
// there, as the sums of a group stay below 2^24.
#include "floats_portable.h"
#include "attention_rows.h"
#include "blocked.h"
#include "convolution_rows.h"
#include "norm_rows.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kRows = 4;   // of a tile
constexpr int kSlice = 8;  // outputs that stay in registers

// q − zero of a group, [input][64], with a zero for each output.
template <bool Bytes>
inline void decode(const uint8_t* codes, int steps, const float* zeros, float* to) {
  constexpr uint32_t mask = Bytes ? 0xff : 0xf;
  for (int step = 0; step < steps; ++step, codes += (Bytes ? 2 : 1) * kWord) {
    uint32_t lanes[(Bytes ? 2 : 1) * NR];
    memcpy(lanes, codes, sizeof(lanes));
    for (int k = 0; k < KR; ++k, to += NR) {
      const uint32_t* word = Bytes ? lanes + k / kFour * NR : lanes;
      const int shift = 8 * (k % kFour) + (Bytes ? 0 : 4 * (k / kFour));
      for (int n = 0; n < NR; ++n) {
        to[n] = static_cast<float>(static_cast<int32_t>((word[n] >> shift) & mask)) - zeros[n];
      }
    }
  }
}

// Σ w x of R rows for outputs from `column` on.
template <int R>
inline void sum_slice(const float* weights, int steps, const float* x, int column,
                      float (&sums)[R][kSlice]) {
  const float* w = weights + column;
  for (int step = 0; step < steps; ++step, x += KR * R) {
    for (int k = 0; k < KR; ++k, w += NR) {
      unrolled<R>([&](auto r) {
        unrolled<kSlice>([&](auto n) { sums[r][n] += w[n] * x[KR * r + k]; });
      });
    }
  }
}

struct PortableMode {
  using Value = float;
  static constexpr int MR = kRows, speed = 15;
  static constexpr bool sums_may_cancel = false;
};

struct FloatMode : PortableMode, GroupByGroup<FloatMode> {
  static void prepare_group(const float* x, int size, float* to, int stride, float*, float*) {
    for (int k = 0; k < size; k += KR) memcpy(to + k / KR * stride, x + k, 4 * KR);
  }

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    float zeros[NR], weights[kMaxGroup * NR];
    for (int n = 0; n < NR; ++n) {
      zeros[n] = group.zero_points ? from_f16(group.zero_points[n]) : static_cast<float>(group.middle);
    }
    decode<Bytes>(group.codes, span.steps, zeros, weights);
    for (int column = 0; column < NR; column += kSlice) {
      float sums[R][kSlice] = {};
      sum_slice<R>(weights, span.steps, reinterpret_cast<const float*>(tile.values), column, sums);
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < kSlice; ++n) {
          outputs[NR * r + column + n] += from_bf16(group.scales[column + n]) * sums[r][n];
        }
      }
    }
  }
};

struct Int8Mode : PortableMode, GroupByGroup<Int8Mode> {
  static void prepare_group(const float* x, int size, float* to, int stride, float* scale,
                            float* sum) {
    int8_t q[kMaxGroup];
    prepare_int8(x, size, q, KR, scale, sum);
    for (int k = 0; k < size; ++k) to[k / KR * stride + k % KR] = q[k];
  }

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    float zeros[NR], weights[kMaxGroup * NR];
    for (float& zero : zeros) zero = static_cast<float>(group.middle);
    decode<Bytes>(group.codes, span.steps, zeros, weights);
    for (int column = 0; column < NR; column += kSlice) {
      float sums[R][kSlice] = {};
      sum_slice<R>(weights, span.steps, reinterpret_cast<const float*>(tile.values), column, sums);
      for (int n = 0; n < kSlice; ++n) {
        const int at = column + n;
        const float offset =
            group.zero_points ? zeros[at] - from_f16(group.zero_points[at]) : 0.0f;
        for (int r = 0; r < R; ++r) {
          outputs[NR * r + at] += int8_product(sums[r][n], offset, tile.sums[r],
                                                     tile.scales[r], from_bf16(group.scales[at]),
                                                     !group.zero_points);
        }
      }
    }
  }
};

// Products of bytes, for `convolution_rows.h`.
struct ByteDots : PlainDots {
  static constexpr int kRows = 16;

  static void multiply(const uint8_t* x, int64_t stride, int rows, const int8_t* weight, int chunks,
                       int32_t* sums) {
    for (int row = 0; row < rows; ++row, x += stride, sums += kSlab) {
      for (int lane = 0; lane < kSlab; lane += kLane) {
        multiply_lane(x, weight + lane * chunks * kChunk, chunks, sums + lane);
      }
    }
  }

  static void multiply_lane(const uint8_t* x, const int8_t* weight, int chunks, int32_t* sums) {
    int32_t total[kLane] = {};
    for (int k = 0; k < chunks * kChunk; k += kFour, weight += kFour * kLane) {
      for (int n = 0; n < kLane; ++n) {
        const int8_t* w = weight + kFour * n;
        total[n] += w[0] * x[k] + w[1] * x[k + 1] + w[2] * x[k + 2] + w[3] * x[k + 3];
      }
    }
    memcpy(sums, total, sizeof(total));
  }
};

}  // namespace

const InstructionSet* portable() {
  static constexpr InstructionSet set{"portable", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return &set;
}

}  // namespace fxquant
