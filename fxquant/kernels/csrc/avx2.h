// AVX2 with FMA: what `avx2.cpp` compiles as it is and `avx2_vnni.cpp` with the dot product of
// AVX-VNNI. A block is multiplied in four slices of 16 outputs, for want of registers.
#pragma once

#include <immintrin.h>

#define FXQUANT_AVX2
#include "blocked.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kVectors = 2;  // of 8 outputs, in a slice
constexpr int kSlice = 8 * kVectors;

inline __m256i load(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

inline __m256 scales_at(const Group& group, int column) {
  const auto* at = reinterpret_cast<const __m128i*>(group.scales + column);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16));
}

inline __m256 zero_points_at(const Group& group, int column) {
  return _mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(group.zero_points + column)));
}

// As in avx512.h; a slice takes its quarter of the lines.
inline void prefetch(const uint8_t* codes) { __builtin_prefetch(codes + 8192); }

struct Int8Mode {
  using Value = int8_t;
  static constexpr bool sums_may_cancel = false;

#ifdef FXQUANT_AVX_VNNI
  static constexpr int tile_rows = 6, speed = 170;
  static constexpr int steps_at_once = kMaxGroup / kStep;

  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }

  static __m256i widen(__m256i sums) { return sums; }
#else
  static constexpr int tile_rows = 4, speed = 110;
  static constexpr int steps_at_once = 4;  // 16 bits hold eight pairs of products: 2 · 15 · 127

  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }

  static __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

  static void prepare_group(const float* x, int size, int8_t* to, int stride, float* scale,
                            float* sum) {
    prepare_int8(x, size, to, stride, scale, sum);
  }

  template <int R, bool Symmetric>
  static void multiply(const Span& span, float* outputs) {
    multiply_groups<Int8Mode, R, Symmetric>(span, outputs);
  }

  template <int R, bool Symmetric>
  static void multiply_group(const Group& group, int steps, const TileGroup& tile,
                             float* outputs) {
    for (int column = 0; column < kColumns; column += kSlice) {
      __m256i sums[R][kVectors];
      unrolled<R>([&](auto r) {
        // Symmetric: Σ (q − 8) x, the 8 taken off before the codes are multiplied.
        const int start = Symmetric ? static_cast<int>(-8 * tile.sums[r]) : 0;
        unrolled<kVectors>([&](auto v) { sums[r][v] = _mm256_set1_epi32(start); });
      });
      for (int done = 0; done < steps; done += steps_at_once) {
        const int count = steps - done < steps_at_once ? steps - done : steps_at_once;
        const uint8_t* codes = group.codes + 4 * (kColumns * done + column);
        add_dots<R>(codes, count, tile.values + kStep * R * done, sums);
      }
      unrolled<kVectors>([&](auto v) {
        const __m256 scales = scales_at(group, column + 8 * v);
        __m256 zero_points = _mm256_setzero_ps();
        if constexpr (!Symmetric) zero_points = zero_points_at(group, column + 8 * v);
        unrolled<R>([&](auto r) {
          __m256 product = _mm256_cvtepi32_ps(sums[r][v]);
          if constexpr (!Symmetric) {
            product = _mm256_fnmadd_ps(zero_points, _mm256_set1_ps(tile.sums[r]), product);
          }
          float* at = outputs + kColumns * r + column + 8 * v;
          product = _mm256_mul_ps(product, _mm256_set1_ps(tile.scales[r]));
          _mm256_store_ps(at, _mm256_fmadd_ps(product, scales, _mm256_load_ps(at)));
        });
      });
    }
  }

  template <int R>
  static void add_dots(const uint8_t* codes, int steps, const uint8_t* x,
                       __m256i (&sums)[R][kVectors]) {
    const __m256i low = _mm256_set1_epi8(0xf);
    __m256i partial[R][kVectors];
    unrolled<R>([&](auto r) {
      unrolled<kVectors>([&](auto v) { partial[r][v] = _mm256_setzero_si256(); });
    });
    for (int step = 0; step < steps; ++step, x += kStep * R, codes += 4 * kColumns) {
      unrolled<2>([&](auto half) {
        __m256i q[kVectors];
        unrolled<kVectors>([&](auto v) {
          q[v] = load(codes + 32 * v);
          if constexpr (half) q[v] = _mm256_srli_epi16(q[v], 4);
          q[v] = _mm256_and_si256(q[v], low);
        });
        unrolled<R>([&](auto r) {
          int bits;
          memcpy(&bits, x + kStep * r + 4 * half, 4);
          const __m256i value = _mm256_set1_epi32(bits);
          unrolled<kVectors>([&](auto v) { partial[r][v] = dot(partial[r][v], q[v], value); });
        });
      });
      prefetch(codes);
    }
    unrolled<R>([&](auto r) {
      unrolled<kVectors>(
          [&](auto v) { sums[r][v] = _mm256_add_epi32(sums[r][v], widen(partial[r][v])); });
    });
  }
};

// float32 throughout: these CPUs have no bfloat16 products.
struct FloatMode {
  using Value = float;
  static constexpr int tile_rows = 6, speed = 60;
  static constexpr bool sums_may_cancel = true;

  static void prepare_group(const float* x, int size, float* to, int stride, float*, float* sum) {
    prepare_float32(x, size, to, stride, sum);
  }

  template <int R, bool Symmetric>
  static void multiply(const Span& span, float* outputs) {
    multiply_groups<FloatMode, R, Symmetric>(span, outputs);
  }

  template <int R, bool Symmetric>
  static void multiply_group(const Group& group, int steps, const TileGroup& tile,
                             float* outputs) {
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x88888888));
    for (int column = 0; column < kColumns; column += kSlice) {
      __m256 sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = _mm256_setzero_ps(); });
      });
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const uint8_t* codes = group.codes + 4 * column;
      for (int step = 0; step < steps; ++step, x += kStep * R, codes += 4 * kColumns) {
        unrolled<kStep>([&](auto k) {
          constexpr int shift = 8 * (k % 4) + 4 * (k / 4);
          __m256 w[kVectors];
          unrolled<kVectors>([&](auto v) {
            // With its top bit flipped, a nibble is q − 8 in two's complement.
            const __m256i lanes = _mm256_xor_si256(load(codes + 32 * v), sign);
            const __m256i top = _mm256_slli_epi32(lanes, 28 - shift);
            w[v] = _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28));
          });
          unrolled<R>([&](auto r) {
            const __m256 value = _mm256_broadcast_ss(x + kStep * r + k);
            unrolled<kVectors>(
                [&](auto v) { sums[r][v] = _mm256_fmadd_ps(w[v], value, sums[r][v]); });
          });
        });
        prefetch(codes);
      }
      unrolled<kVectors>([&](auto v) {
        const __m256 scales = scales_at(group, column + 8 * v);
        __m256 offset = _mm256_setzero_ps();
        if constexpr (!Symmetric) {
          offset = _mm256_sub_ps(_mm256_set1_ps(8), zero_points_at(group, column + 8 * v));
        }
        unrolled<R>([&](auto r) {
          __m256 product = sums[r][v];
          if constexpr (!Symmetric) {
            product = _mm256_fmadd_ps(offset, _mm256_set1_ps(tile.sums[r]), product);
          }
          float* at = outputs + kColumns * r + column + 8 * v;
          _mm256_store_ps(at, _mm256_fmadd_ps(product, scales, _mm256_load_ps(at)));
        });
      });
    }
  }
};

}  // namespace
}  // namespace fxquant
