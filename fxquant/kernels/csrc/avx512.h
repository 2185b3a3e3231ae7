// AVX-512 with VNNI: tiles of at most 6 rows by 64 outputs. What multiplies float activations differs:
// `avx512_bf16.cpp` has products of bfloat16, `avx512_vnni.cpp` of float32. `amx.cpp` prepares and
// unpacks as these do, and multiplies by the CPU's matrix unit.
#pragma once

#include <immintrin.h>

#if !defined(__clang__)  // false alarms inside GCC 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FXQUANT_AVX512
#include "floats_avx512.h"
#include "blocked.h"
#include "convolution_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kVectors = 4;  // of 16 outputs, in a block

// Inline assembly, because GCC 12 spills accumulators that it manages itself.
inline __m512i dot_int8(__m512i sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}

inline __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }

inline __m512i broadcast(const void* at) {
  int bits;
  memcpy(&bits, at, 4);
  return _mm512_set1_epi32(bits);
}

inline __m512 scales_at(const Group& group, int vector) {
  const auto* at = reinterpret_cast<const __m256i*>(group.scales + 16 * vector);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16));
}

inline __m512 zero_points_at(const Group& group, int vector) {
  const auto* at = reinterpret_cast<const __m256i*>(group.zero_points + 16 * vector);
  return _mm512_cvtph_ps(_mm256_loadu_si256(at));
}

// middle − zero point
inline __m512 offset_at(const Group& group, int vector) {
  const __m512 middle = _mm512_set1_ps(static_cast<float>(group.middle));
  return _mm512_sub_ps(middle, zero_points_at(group, vector));
}

// Asks for the lines of a word.
inline void prefetch(const uint8_t* codes) {
  for (int line = 0; line < kWord; line += 64) __builtin_prefetch(codes + line);
}

// Walks through the groups of a span; `add(group, tile, totals)` adds the product of a group. What
// does not fit in registers beside a group's sums waits on the stack, which never leaves the cache.
template <int R, class Add>
inline void for_groups(const Span& span, float* outputs, const Add& add) {
  __m512 totals[R][kVectors];
  const auto at = [outputs](int r, int v) { return outputs + NR * r + 16 * v; };
  unrolled<R>([&](auto r) {
    unrolled<kVectors>([&](auto v) { totals[r][v] = _mm512_load_ps(at(r, v)); });
  });
  for (int i = 0; i < span.groups; ++i) add(span.group(i), span.tile(i), totals);
  unrolled<R>([&](auto r) {
    unrolled<kVectors>([&](auto v) { _mm512_store_ps(at(r, v), totals[r][v]); });
  });
}

// Adds the sums of a group, of q − middle times x in float32, to the outputs.
template <int R>
FXQUANT_INLINE void add_sums(const Group& group, const TileGroup& tile,
                             const __m512 (&sums)[R][kVectors], __m512 (&totals)[R][kVectors]) {
  unrolled<kVectors>([&](auto v) {
    const __m512 scales = scales_at(group, v);
    __m512 offset;
    if (group.zero_points) offset = offset_at(group, v);
    unrolled<R>([&](auto r) {
      __m512 product = sums[r][v];
      if (group.zero_points) {
        product = _mm512_fmadd_ps(offset, _mm512_set1_ps(tile.sums[r]), product);
      }
      totals[r][v] = _mm512_fmadd_ps(product, scales, totals[r][v]);
    });
  });
}

struct Int8Mode : ByteCodes {
  using Value = int8_t;
  static constexpr int MR = 6, speed = 400;
  static constexpr bool sums_may_cancel = false;

  static void prepare_group(const float* x, int size, int8_t* to, int stride, float* scale,
                            float* sum) {
    __m512i largest = _mm512_setzero_si512(), total = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int k = 0; k < size; k += kLanes) {
      const __m512i bits = _mm512_loadu_si512(x + k);
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    *scale = int8_step(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
    const __m512 reciprocal = _mm512_set1_ps(1.0f / *scale);
    const __mmask16 known = *scale == *scale ? 0xffff : 0;  // NaN would sum to an overflow
    for (int k = 0; k < size; k += kLanes, to += 2 * stride) {
      const __m512 quotient = _mm512_mul_ps(_mm512_loadu_ps(x + k), reciprocal);
      const __m512i q = _mm512_maskz_cvtps_epi32(known, quotient);
      total = _mm512_add_epi32(total, q);
      store_steps(_mm512_cvtepi32_epi8(q), k + KR < size, to, stride);
    }
    *sum = static_cast<float>(_mm512_reduce_add_epi32(total));
  }

  static void store_steps(__m128i q, bool both, int8_t* to, int stride) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), q);
    if (both) _mm_storel_epi64(reinterpret_cast<__m128i*>(to + stride), _mm_srli_si128(q, 8));
  }

  // Four inputs of 16 outputs, as bytes: the half of a nibble's step, or a word.
  template <bool Bytes>
  static __m512i codes_at(const uint8_t* codes, int vector, int half) {
    if (Bytes) return load(codes + kWord * half + 64 * vector);
    const __m512i lanes = load(codes + 64 * vector);
    return _mm512_and_si512(half ? _mm512_srli_epi16(lanes, 4) : lanes, _mm512_set1_epi8(0xf));
  }

  template <int R, bool Bytes>
  static void multiply(const Span& span, float* outputs) {
    for_groups<R>(span, outputs, [&](const Group& group, const TileGroup& tile,
                                     __m512(&totals)[R][kVectors]) {
      __m512i sums[R][kVectors];
      unrolled<R>([&](auto r) {
        // Σ (q − middle) x: what is taken off comes before the codes are multiplied.
        const __m512i start = _mm512_set1_epi32(static_cast<int>(-group.middle * tile.sums[r]));
        unrolled<kVectors>([&](auto v) { sums[r][v] = start; });
      });
      const uint8_t* x = tile.values;
      const uint8_t* codes = group.codes;
      for (int step = 0; step < span.steps; ++step, x += KR * R) {
        unrolled<2>([&](auto half) {
          __m512i q[kVectors];
          unrolled<kVectors>([&](auto v) { q[v] = codes_at<Bytes>(codes, v, half); });
          unrolled<R>([&](auto r) {
            const __m512i value = broadcast(x + KR * r + 4 * half);
            unrolled<kVectors>([&](auto v) { sums[r][v] = dot_int8(sums[r][v], q[v], value); });
          });
        });
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          prefetch(codes + span.ahead);
        }
      }
      unrolled<kVectors>([&](auto v) {
        const __m512 scales = scales_at(group, v);
        __m512 offset;
        if (group.zero_points) offset = offset_at(group, v);
        unrolled<R>([&](auto r) {
          // The order of `int8_product`.
          __m512 product = _mm512_cvtepi32_ps(sums[r][v]);
          if (group.zero_points) {
            const __m512 part = _mm512_mul_ps(offset, _mm512_set1_ps(tile.sums[r]));
            product = _mm512_add_ps(product, part);
          }
          product = _mm512_mul_ps(product, _mm512_set1_ps(tile.scales[r]));
          totals[r][v] = _mm512_add_ps(totals[r][v], _mm512_mul_ps(product, scales));
        });
      });
    });
  }
};

// Products of bytes, for `convolution_rows.h`.
struct ByteDots : PlainDots {
  static constexpr int kRows = 12;

  static void multiply(const uint8_t* x, int64_t stride, int, const int8_t* weight, int chunks,
                       int32_t* sums) {
    __m512i total[kRows][2];
    unrolled<kRows>([&](auto r) { total[r][0] = total[r][1] = _mm512_setzero_si512(); });
    const auto* first = reinterpret_cast<const uint8_t*>(weight);
    const uint8_t* second = first + chunks * kChunk * kLane;
    for (int k = 0; k < chunks * kChunk; k += kFour, first += 64, second += 64, x += kFour) {
      const __m512i w0 = load(first), w1 = load(second);
      unrolled<kRows>([&](auto r) {
        const __m512i value = broadcast(x + r * stride);
        total[r][0] = dot_int8(total[r][0], value, w0);
        total[r][1] = dot_int8(total[r][1], value, w1);
      });
    }
    unrolled<kRows>([&](auto r) {
      _mm512_store_si512(sums + kSlab * r, total[r][0]);
      _mm512_store_si512(sums + kSlab * r + kLane, total[r][1]);
    });
  }
};

}  // namespace
}  // namespace fxquant
