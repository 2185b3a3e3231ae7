// Four float32 in a register of NEON: see floats_avx2.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace fxquant {
namespace {

using Floats = float32x4_t;
constexpr int kFloats = 4, kTileRows = 6, kTileVectors = 4;

inline Floats load_floats_at(const float* at) { return vld1q_f32(at); }
inline void store_floats_at(float* at, Floats a) { vst1q_f32(at, a); }
inline Floats all_floats(float a) { return vdupq_n_f32(a); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats largest(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Floats smallest(Floats a, Floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }

inline Floats power_of_two(Floats x) {
  const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(x), 23);
  return vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(0x3f800000)));
}

inline float sum_of(Floats a) { return vaddvq_f32(a); }
inline float largest_of(Floats a) { return vmaxvq_f32(a); }

}  // namespace
}  // namespace fxquant
