// AVX2 with FMA: what `avx2.cpp` compiles as it is and `avx2_vnni.cpp` with the dot product of
// AVX-VNNI. A block is multiplied in slices of 16 outputs or more, as registers allow.
#pragma once

#include <immintrin.h>

#define FXQUANT_AVX2
#include "floats_avx2.h"
#include "attention_rows.h"
#include "blocked.h"
#include "convolution_rows.h"
#include "norm_rows.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kVectors = 2;  // of 8 outputs, in a slice

// Few rows take more outputs at once: whole lines are read one after another, and eight sums or more
// are on their way while one waits for the next addition.
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : kVectors; }

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

// Asks for the lines of a step that a slice of so many vectors reads.
template <int Vectors>
inline void prefetch(const uint8_t* codes) {
  for (int line = 0; line < 32 * Vectors; line += 64) __builtin_prefetch(codes + line);
}

// middle − zero point
inline __m256 offset_at(const Group& group, int column) {
  const __m256 middle = _mm256_set1_ps(static_cast<float>(group.middle));
  return _mm256_sub_ps(middle, zero_points_at(group, column));
}

inline __m256i broadcast(const uint8_t* at) {
  int bits;
  memcpy(&bits, at, 4);
  return _mm256_set1_epi32(bits);
}

struct Int8Mode : GroupByGroup<Int8Mode> {
  using Value = int8_t;
  static constexpr bool sums_may_cancel = false;

#ifdef FXQUANT_AVX_VNNI
  static constexpr int MR = 6, speed = 170;
  static constexpr bool kHasDot = true;
  static constexpr int steps_at_once = kMaxGroup / KR;

  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }

  static __m256i widen(__m256i sums) { return sums; }

  static __m256i byte_dot(__m256i sum, __m256i q, __m256i x) { return dot(sum, q, x); }
#else
  static constexpr int MR = 4, speed = 110;
  static constexpr bool kHasDot = false;
  static constexpr int steps_at_once = 4;  // 16 bits hold eight pairs of products: 2 · 15 · 127

  static __m256i dot(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }

  static __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

  // |q| · (x with the sign of q): two products of at most 128 · 127 fit in 16 bits.
  static __m256i byte_dot(__m256i sum, __m256i q, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
    return _mm256_add_epi32(sum, widen(pairs));
  }
#endif

  static void prepare_group(const float* x, int size, int8_t* to, int stride, float* scale,
                            float* sum) {
    prepare_int8(x, size, to, stride, scale, sum);
  }

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    constexpr int kWide = Bytes ? vectors_for(R) : kVectors;
    for (int column = 0; column < NR; column += 8 * kWide) {
      __m256i sums[R][kWide];
      unrolled<R>([&](auto r) {
        // What unsigned codes give beyond Σ (q − middle) x is taken off beforehand.
        const bool is_signed = Bytes && !kHasDot;
        const int start = is_signed ? 0 : static_cast<int>(-group.middle * tile.sums[r]);
        unrolled<kWide>([&](auto v) { sums[r][v] = _mm256_set1_epi32(start); });
      });
      if constexpr (Bytes) {
        add_byte_dots<R, kWide>(group.codes + 4 * column, span, group.middle, tile.values, sums);
      } else {
        for (int done = 0; done < span.steps; done += steps_at_once) {
          const int left = span.steps - done, count = left < steps_at_once ? left : steps_at_once;
          const uint8_t* codes = group.codes + 4 * (NR * done + column);
          add_dots<R>(codes, count, span.ahead, tile.values + KR * R * done, sums);
        }
      }
      unrolled<kWide>([&](auto v) {
        const __m256 scales = scales_at(group, column + 8 * v);
        __m256 offset = _mm256_setzero_ps();
        if (group.zero_points) offset = offset_at(group, column + 8 * v);
        unrolled<R>([&](auto r) {
          // The order of `int8_product`.
          __m256 product = _mm256_cvtepi32_ps(sums[r][v]);
          if (group.zero_points) {
            const __m256 part = _mm256_mul_ps(offset, _mm256_set1_ps(tile.sums[r]));
            product = _mm256_add_ps(product, part);
          }
          float* at = outputs + NR * r + column + 8 * v;
          product = _mm256_mul_ps(product, _mm256_set1_ps(tile.scales[r]));
          product = _mm256_mul_ps(product, scales);
          _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), product));
        });
      });
    }
  }

  // Adds Σ q x of bytes q where unsigned ones can be multiplied, else Σ (q − middle) x.
  template <int R, int kWide>
  static void add_byte_dots(const uint8_t* codes, const Span& span, int middle, const uint8_t* x,
                            __m256i (&sums)[R][kWide]) {
    const __m256i middles = _mm256_set1_epi8(static_cast<char>(middle));
    for (int step = 0; step < span.steps; ++step, x += KR * R) {
      unrolled<2>([&](auto half) {
        __m256i q[kWide];
        unrolled<kWide>([&](auto v) {
          q[v] = load(codes + 32 * v);
          if constexpr (!kHasDot) q[v] = _mm256_sub_epi8(q[v], middles);
        });
        unrolled<R>([&](auto r) {
          const __m256i value = broadcast(x + KR * r + 4 * half);
          unrolled<kWide>([&](auto v) { sums[r][v] = byte_dot(sums[r][v], q[v], value); });
        });
        prefetch<kWide>(codes + span.ahead);
        codes += kWord;
      });
    }
  }

  template <int R>
  static void add_dots(const uint8_t* codes, int steps, int ahead, const uint8_t* x,
                       __m256i (&sums)[R][kVectors]) {
    const __m256i low = _mm256_set1_epi8(0xf);
    __m256i partial[R][kVectors];
    unrolled<R>([&](auto r) {
      unrolled<kVectors>([&](auto v) { partial[r][v] = _mm256_setzero_si256(); });
    });
    for (int step = 0; step < steps; ++step, x += KR * R, codes += 4 * NR) {
      unrolled<2>([&](auto half) {
        __m256i q[kVectors];
        unrolled<kVectors>([&](auto v) {
          q[v] = load(codes + 32 * v);
          if constexpr (half) q[v] = _mm256_srli_epi16(q[v], 4);
          q[v] = _mm256_and_si256(q[v], low);
        });
        unrolled<R>([&](auto r) {
          const __m256i value = broadcast(x + KR * r + 4 * half);
          unrolled<kVectors>([&](auto v) { partial[r][v] = dot(partial[r][v], q[v], value); });
        });
      });
      prefetch<kVectors>(codes + ahead);
    }
    unrolled<R>([&](auto r) {
      unrolled<kVectors>(
          [&](auto v) { sums[r][v] = _mm256_add_epi32(sums[r][v], widen(partial[r][v])); });
    });
  }
};

// float32 throughout: these CPUs have no bfloat16 products. Many rows are multiplied by weights made
// float32 once for all of them, in the same order and so to the same bits.
struct FloatMode : GroupByGroup<FloatMode> {
  using Value = float;
  static constexpr int MR = 6, speed = 60, float_tiles = 3, float_columns = 8 * kVectors;
  static constexpr bool sums_may_cancel = true;

  static void prepare_group(const float* x, int size, float* to, int stride, float*, float* sum) {
    prepare_float32(x, size, to, stride, sum);
  }

  template <int R, bool Bytes>
  static void multiply_group(const Span& span, const Group& group, const TileGroup& tile,
                             float* outputs) {
    constexpr int kWide = vectors_for(R);
    for (int column = 0; column < NR; column += 8 * kWide) {
      __m256 sums[R][kWide];
      clear(sums);
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const uint8_t* codes = group.codes + 4 * column;
      for (int step = 0; step < span.steps; ++step, x += KR * R) {
        add_step<R, kWide, Bytes>(codes, group.middle, x, sums);
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          prefetch<kWide>(codes + span.ahead);
        }
      }
      add_sums(group, tile, column, sums, outputs);
    }
  }

  // A slice of a block whose codes are what `unpack_floats` made.
  template <int R>
  static void multiply_floats(const Span& span, float* outputs) {
    for (int i = 0; i < span.groups; ++i) {
      const Group group = span.group(i);
      const TileGroup tile = span.tile(i);
      __m256 sums[R][kVectors];
      clear(sums);
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const auto* weights = reinterpret_cast<const float*>(group.codes);
      for (int step = 0; step < span.steps; ++step, x += KR * R, weights += KR * float_columns) {
        unrolled<KR>([&](auto k) {
          const auto weights_at = [&](auto v) {
            return _mm256_load_ps(weights + k * float_columns + 8 * v);
          };
          add_input<R, kVectors>(weights_at, x + k, sums);
        });
      }
      add_sums(group, tile, 0, sums, outputs);
    }
  }

  // q − middle of a group as float32 [inputs][float_columns] of each slice; `stride` is from slice to
  // slice.
  template <bool Bytes>
  static void unpack_floats(const Group& group, int steps, float* to, int64_t stride) {
    for (int column = 0; column < NR; column += float_columns, to += stride) {
      const uint8_t* codes = group.codes + 4 * column;
      float* at = to;
      for (int step = 0; step < steps; ++step, at += KR * float_columns) {
        unrolled<KR>([&](auto k) {
          unrolled<kVectors>([&](auto v) {
            const __m256 weights = weights_of<Bytes>(codes, group.middle, k, v);
            _mm256_store_ps(at + k * float_columns + 8 * v, weights);
          });
        });
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          __builtin_prefetch(codes + kAhead);
        }
      }
    }
  }

  template <int R, int Wide>
  FXQUANT_INLINE static void clear(__m256 (&sums)[R][Wide]) {
    unrolled<R>([&](auto r) {
      unrolled<Wide>([&](auto v) { sums[r][v] = _mm256_setzero_ps(); });
    });
  }

  // Adds the sums of a group to the outputs from `column` on.
  template <int R, int Wide>
  FXQUANT_INLINE static void add_sums(const Group& group, const TileGroup& tile, int column,
                                      const __m256 (&sums)[R][Wide], float* outputs) {
    unrolled<Wide>([&](auto v) {
      const __m256 scales = scales_at(group, column + 8 * v);
      __m256 offset = _mm256_setzero_ps();
      if (group.zero_points) offset = offset_at(group, column + 8 * v);
      unrolled<R>([&](auto r) {
        __m256 product = sums[r][v];
        if (group.zero_points) {
          product = _mm256_fmadd_ps(offset, _mm256_set1_ps(tile.sums[r]), product);
        }
        float* at = outputs + NR * r + column + 8 * v;
        _mm256_store_ps(at, _mm256_fmadd_ps(product, scales, _mm256_load_ps(at)));
      });
    });
  }

  // q − middle of the input `k` of a step, of eight outputs. In two's complement q − 8 is a nibble
  // with its top bit flipped.
  template <bool Bytes, class K, class V>
  FXQUANT_INLINE static __m256 weights_of(const uint8_t* codes, int middle, K k, V v) {
    constexpr int kWidth = Bytes ? 8 : 4;
    constexpr int kShift = 8 * (K::value % kFour) + (Bytes ? 0 : 4 * (K::value / kFour));
    const uint8_t* word = codes + (Bytes ? k / kFour * kWord : 0);
    const __m256i lanes = load(word + 32 * v);
    const __m256i q =
        Bytes ? _mm256_sub_epi8(lanes, _mm256_set1_epi8(static_cast<char>(middle)))
              : _mm256_xor_si256(lanes, _mm256_set1_epi32(static_cast<int>(0x88888888)));
    const __m256i top = _mm256_slli_epi32(q, 32 - kWidth - kShift);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - kWidth));
  }

  // Adds Σ (q − middle) x of eight inputs.
  template <int R, int Wide, bool Bytes>
  FXQUANT_INLINE static void add_step(const uint8_t* codes, int middle, const float* x,
                                      __m256 (&sums)[R][Wide]) {
    unrolled<KR>([&](auto k) {
      const auto weights_at = [&](auto v) { return weights_of<Bytes>(codes, middle, k, v); };
      add_input<R, Wide>(weights_at, x + k, sums);
    });
  }

  // Adds the products of one input.
  template <int R, int Wide, class WeightsAt>
  FXQUANT_INLINE static void add_input(const WeightsAt& weights_at, const float* x,
                                       __m256 (&sums)[R][Wide]) {
    if constexpr (R == 1) {  // the sums leave no registers for as many weights
      const __m256 value = _mm256_broadcast_ss(x);
      unrolled<Wide>([&](auto v) {
        sums[0][v] = _mm256_fmadd_ps(weights_at(v), value, sums[0][v]);
      });
    } else {  // each x is loaded once for all outputs
      __m256 w[Wide];
      unrolled<Wide>([&](auto v) { w[v] = weights_at(v); });
      unrolled<R>([&](auto r) {
        const __m256 value = _mm256_broadcast_ss(x + KR * r);
        unrolled<Wide>([&](auto v) { sums[r][v] = multiply_add(w[v], value, sums[r][v]); });
      });
    }
  }

  // Inline assembly, because GCC 12 spills accumulators that it manages itself.
  static __m256 multiply_add(__m256 w, __m256 x, __m256 sum) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
  }
};

// Products of bytes, for `convolution_rows.h`.
struct ByteDots : PlainDots {
  static constexpr int kRows = 4;

  static void multiply(const uint8_t* x, int64_t stride, int, const int8_t* weight, int chunks,
                       int32_t* sums) {
    const auto* from = reinterpret_cast<const uint8_t*>(weight);
    for (int lane = 0; lane < kSlab; lane += kLane, from += chunks * kChunk * kLane) {
      multiply_lane(x, stride, from, chunks, sums + lane);
    }
  }

  static void multiply_lane(const uint8_t* x, int64_t stride, const uint8_t* weight, int chunks,
                            int32_t* sums) {
    __m256i total[kRows][2];
    unrolled<kRows>([&](auto r) { total[r][0] = total[r][1] = _mm256_setzero_si256(); });
    for (int k = 0; k < chunks * kChunk; k += kFour, weight += 64, x += kFour) {
      const __m256i w[2] = {load(weight), load(weight + 32)};
#ifdef FXQUANT_AVX_VNNI
      unrolled<kRows>([&](auto r) {
        const __m256i value = broadcast(x + r * stride);
        unrolled<2>([&](auto v) { total[r][v] = _mm256_dpbusd_avx_epi32(total[r][v], value, w[v]); });
      });
#else
      // Pairs of products of unsigned and signed bytes do not fit in 16 bits: these are widened before.
      const __m256i low_byte = _mm256_set1_epi16(0xff);
      __m256i even[2], odd[2];
      unrolled<2>([&](auto v) {
        even[v] = _mm256_srai_epi16(_mm256_slli_epi16(w[v], 8), 8);
        odd[v] = _mm256_srai_epi16(w[v], 8);
      });
      unrolled<kRows>([&](auto r) {
        const __m256i value = broadcast(x + r * stride);
        const __m256i evens = _mm256_and_si256(value, low_byte), odds = _mm256_srli_epi16(value, 8);
        unrolled<2>([&](auto v) {
          const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(evens, even[v]),
                                                 _mm256_madd_epi16(odds, odd[v]));
          total[r][v] = _mm256_add_epi32(total[r][v], pairs);
        });
      });
#endif
    }
    unrolled<kRows>([&](auto r) {
      unrolled<2>([&](auto v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + kSlab * r + 8 * v), total[r][v]);
      });
    });
  }
};

}  // namespace
}  // namespace fxquant
