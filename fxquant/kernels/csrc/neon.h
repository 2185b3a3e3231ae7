// NEON of 64-bit Arm: what `neon.cpp` compiles as it is and `neon_dot.cpp` with the dot product of
// bytes. A block is multiplied in four slices of 16 outputs. Integers give the bits of `portable.cpp`;
// the speed was not measured on an Arm CPU.
#pragma once

#include <arm_neon.h>

#define FXQUANT_NEON
#include "floats_neon.h"
#include "attention_rows.h"
#include "blocked.h"
#include "convolution_rows.h"
#include "norm_rows.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kVectors = 4;  // of 4 outputs, in a slice
constexpr int kSlice = 4 * kVectors;

inline float32x4_t scales_at(const Group& group, int column) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(group.scales + column), 16));
}

// middle − zero point
inline float32x4_t offset_at(const Group& group, int column) {
  const float16x4_t zero_points = vreinterpret_f16_u16(vld1_u16(group.zero_points + column));
  return vsubq_f32(vdupq_n_f32(static_cast<float>(group.middle)), vcvt_f32_f16(zero_points));
}

// q − middle of four inputs of 4 outputs, as bytes: half of a nibble's step, or a word.
template <bool Bytes>
inline int8x16_t codes_at(const uint8_t* codes, int vector, int half, int middle) {
  uint8x16_t q = vld1q_u8(codes + 16 * vector + (Bytes ? kWord * half : 0));
  if (!Bytes) q = half ? vshrq_n_u8(q, 4) : vandq_u8(q, vdupq_n_u8(0xf));
  return vreinterpretq_s8_u8(vsubq_u8(q, vdupq_n_u8(static_cast<uint8_t>(middle))));
}

template <int Vectors>
inline void prefetch(const uint8_t* codes) {
  for (int line = 0; line < 16 * Vectors; line += 64) __builtin_prefetch(codes + line);
}

struct Int8Mode : GroupByGroup<Int8Mode> {
  using Value = int8_t;
  static constexpr bool sums_may_cancel = false;

  static void prepare_group(const float* x, int size, int8_t* to, int stride, float* scale,
                            float* sum) {
    prepare_int8(x, size, to, stride, scale, sum);
  }

#ifdef FXQUANT_ARM_DOT
  static constexpr int MR = 6, speed = 80;

  // Adds the products of the inputs 4 · Half .. 4 · Half + 3 of a step.
  template <int Half>
  static int32x4_t dot(int32x4_t sum, int8x16_t q, int8x8_t x) {
    return vdotq_lane_s32(sum, q, x, Half);
  }
#else
  static constexpr int MR = 4, speed = 30;

  template <int Half>
  static int32x4_t dot(int32x4_t sum, int8x16_t q, int8x8_t x) {
    const int8x8_t four = vreinterpret_s8_s32(vdup_lane_s32(vreinterpret_s32_s8(x), Half));
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(q), four));
    const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(q), four));
    return vaddq_s32(sum, vpaddq_s32(low, high));
  }
#endif

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    for (int column = 0; column < NR; column += kSlice) {
      int32x4_t sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = vdupq_n_s32(0); });
      });
      const auto* x = reinterpret_cast<const int8_t*>(tile.values);
      const uint8_t* codes = group.codes + 4 * column;
      for (int step = 0; step < span.steps; ++step, x += KR * R) {
        unrolled<2>([&](auto half) {
          int8x16_t q[kVectors];
          unrolled<kVectors>(
              [&](auto v) { q[v] = codes_at<Bytes>(codes, v, half, group.middle); });
          unrolled<R>([&](auto r) {
            const int8x8_t value = vld1_s8(x + KR * r);
            unrolled<kVectors>(
                [&](auto v) { sums[r][v] = dot<half.value>(sums[r][v], q[v], value); });
          });
        });
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          prefetch<kVectors>(codes + span.ahead);
        }
      }
      unrolled<kVectors>([&](auto v) {
        const float32x4_t scales = scales_at(group, column + 4 * v);
        float32x4_t offset = vdupq_n_f32(0);
        if (group.zero_points) offset = offset_at(group, column + 4 * v);
        unrolled<R>([&](auto r) {
          // The order of `int8_product`.
          float32x4_t product = vcvtq_f32_s32(sums[r][v]);
          if (group.zero_points) product = vaddq_f32(product, vmulq_n_f32(offset, tile.sums[r]));
          float* at = outputs + NR * r + column + 4 * v;
          product = vmulq_f32(vmulq_n_f32(product, tile.scales[r]), scales);
          vst1q_f32(at, vaddq_f32(vld1q_f32(at), product));
        });
      });
    }
  }
};

struct FloatMode : GroupByGroup<FloatMode> {
  using Value = float;
  static constexpr int MR = 4, speed = 20;
  static constexpr bool sums_may_cancel = true;

  static void prepare_group(const float* x, int size, float* to, int stride, float*, float* sum) {
    prepare_float32(x, size, to, stride, sum);
  }

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    for (int column = 0; column < NR; column += kSlice) {
      float32x4_t sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = vdupq_n_f32(0); });
      });
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const uint8_t* codes = group.codes + 4 * column;
      for (int step = 0; step < span.steps; ++step, x += KR * R) {
        unrolled<KR>([&](auto k) {
          float32x4_t w[kVectors];
          unrolled<kVectors>([&](auto v) {
            const int8x16_t q = codes_at<Bytes>(codes, v, k / kFour, group.middle);
            constexpr int byte = k % kFour;
            const int32x4_t top = vshlq_n_s32(vreinterpretq_s32_s8(q), 24 - 8 * byte);
            w[v] = vcvtq_f32_s32(vshrq_n_s32(top, 24));
          });
          unrolled<R>([&](auto r) {
            const float value = x[KR * r + k];
            unrolled<kVectors>([&](auto v) { sums[r][v] = vfmaq_n_f32(sums[r][v], w[v], value); });
          });
        });
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          prefetch<kVectors>(codes + span.ahead);
        }
      }
      unrolled<kVectors>([&](auto v) {
        const float32x4_t scales = scales_at(group, column + 4 * v);
        float32x4_t offset = vdupq_n_f32(0);
        if (group.zero_points) offset = offset_at(group, column + 4 * v);
        unrolled<R>([&](auto r) {
          float32x4_t product = sums[r][v];
          if (group.zero_points) product = vfmaq_n_f32(product, offset, tile.sums[r]);
          float* at = outputs + NR * r + column + 4 * v;
          vst1q_f32(at, vfmaq_f32(vld1q_f32(at), product, scales));
        });
      });
    }
  }
};

// Products of bytes, for `convolution_rows.h`. Both factors are signed here: 128 is taken off x.
struct ByteDots : PlainDots {
  static constexpr int kRows = 4, kTakenOff = 128;

  static void multiply(const uint8_t* x, int64_t stride, int, const int8_t* weight, int chunks,
                       int32_t* sums) {
    for (int lane = 0; lane < kSlab; lane += kLane, weight += chunks * kChunk * kLane) {
      multiply_lane(x, stride, weight, chunks, sums + lane);
    }
  }

  static void multiply_lane(const uint8_t* x, int64_t stride, const int8_t* weight, int chunks,
                            int32_t* sums) {
    int32x4_t total[kRows][4];
    unrolled<kRows>([&](auto r) {
      unrolled<4>([&](auto v) { total[r][v] = vdupq_n_s32(0); });
    });
    for (int k = 0; k < chunks * kChunk; k += kFour, weight += kFour * kLane, x += kFour) {
      unrolled<kRows>([&](auto r) {
        uint32_t four;
        memcpy(&four, x + r * stride, kFour);
        const int8x16_t value = vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
        unrolled<4>([&](auto v) {
          total[r][v] = dot_of_fours(total[r][v], vld1q_s8(weight + 16 * v), value);
        });
      });
    }
    unrolled<kRows>([&](auto r) {
      unrolled<4>([&](auto v) { vst1q_s32(sums + kSlab * r + 4 * v, total[r][v]); });
    });
  }

  // Adds the products of four bytes each.
  static int32x4_t dot_of_fours(int32x4_t sum, int8x16_t a, int8x16_t b) {
#ifdef FXQUANT_ARM_DOT
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
  }
};

}  // namespace
}  // namespace fxquant
