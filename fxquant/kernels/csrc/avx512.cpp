// AVX-512 with VNNI and BF16: tiles of at most 6 rows by 64 outputs.
#include "linear.h"
#include "targets.h"

#ifdef FXQUANT_X86

#include <immintrin.h>

#if !defined(__clang__)  // false alarms inside GCC 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FXQUANT_AVX512
FXQUANT_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")

#include "blocked.h"
#include "rounding_rows.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kVectors = 4;  // of 16 outputs, in a block

// Inline assembly, because GCC 12 spills accumulators that it manages itself.
inline __m512i dot_int8(__m512i sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}

inline __m512 dot_bf16(__m512 sum, __m512i codes, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
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

// Two groups of 128 ahead, which hides the latency of memory when each weight is used once.
inline void prefetch(const uint8_t* codes) {
  for (int line = 0; line < 4; ++line) __builtin_prefetch(codes + 8192 + 64 * line);
}

// Walks through the groups of a span; `add(group, tile, totals)` adds the product of a group. What
// does not fit in registers beside a group's sums waits on the stack, which never leaves the cache.
template <int R, bool Symmetric, class Add>
inline void for_groups(const Span& span, float* outputs, const Add& add) {
  __m512 totals[R][kVectors];
  const auto at = [outputs](int r, int v) { return outputs + kColumns * r + 16 * v; };
  unrolled<R>([&](auto r) {
    unrolled<kVectors>([&](auto v) { totals[r][v] = _mm512_load_ps(at(r, v)); });
  });
  for (int i = 0; i < span.groups; ++i) add(span.group<Symmetric>(i), span.tile(i), totals);
  unrolled<R>([&](auto r) {
    unrolled<kVectors>([&](auto v) { _mm512_store_ps(at(r, v), totals[r][v]); });
  });
}

struct Int8Mode {
  using Value = int8_t;
  static constexpr int tile_rows = 6;
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
      store_steps(_mm512_cvtepi32_epi8(q), k + kStep < size, to, stride);
    }
    *sum = static_cast<float>(_mm512_reduce_add_epi32(total));
  }

  static void store_steps(__m128i q, bool both, int8_t* to, int stride) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), q);
    if (both) _mm_storel_epi64(reinterpret_cast<__m128i*>(to + stride), _mm_srli_si128(q, 8));
  }

  template <int R, bool Symmetric>
  static void multiply(const Span& span, float* outputs) {
    const __m512i low = _mm512_set1_epi8(0xf);
    for_groups<R, Symmetric>(span, outputs, [&](const Group& group, const TileGroup& tile,
                                                __m512(&totals)[R][kVectors]) {
      __m512i sums[R][kVectors];
      unrolled<R>([&](auto r) {
        // Symmetric: Σ (q − 8) x, the 8 taken off before the codes are multiplied.
        const __m512 sum = _mm512_set1_ps(Symmetric ? tile.sums[r] : 0);
        const __m512i start = _mm512_cvtps_epi32(_mm512_mul_ps(sum, _mm512_set1_ps(-8)));
        unrolled<kVectors>([&](auto v) { sums[r][v] = start; });
      });
      const uint8_t* x = tile.values;
      const uint8_t* codes = group.codes;
      for (int step = 0; step < span.steps; ++step, x += kStep * R, codes += 4 * kColumns) {
        unrolled<2>([&](auto half) {
          __m512i q[kVectors];
          unrolled<kVectors>([&](auto v) {
            q[v] = load(codes + 64 * v);
            if constexpr (half) q[v] = _mm512_srli_epi16(q[v], 4);
            q[v] = _mm512_and_si512(q[v], low);
          });
          unrolled<R>([&](auto r) {
            const __m512i value = broadcast(x + kStep * r + 4 * half);
            unrolled<kVectors>([&](auto v) { sums[r][v] = dot_int8(sums[r][v], q[v], value); });
          });
        });
        prefetch(codes);
      }
      unrolled<kVectors>([&](auto v) {
        const __m512 scales = scales_at(group, v);
        __m512 zero_points;
        if constexpr (!Symmetric) zero_points = zero_points_at(group, v);
        unrolled<R>([&](auto r) {
          __m512 product = _mm512_cvtepi32_ps(sums[r][v]);
          if constexpr (!Symmetric) {
            product = _mm512_fnmadd_ps(zero_points, _mm512_set1_ps(tile.sums[r]), product);
          }
          product = _mm512_mul_ps(product, _mm512_set1_ps(tile.scales[r]));
          totals[r][v] = _mm512_fmadd_ps(product, scales, totals[r][v]);
        });
      });
    });
  }
};

struct FloatMode {
  using Value = uint16_t;  // bfloat16
  static constexpr int tile_rows = 6;
  static constexpr bool sums_may_cancel = true;

  static void prepare_group(const float* x, int size, uint16_t* to, int stride, float*,
                            float* sum) {
    const auto bits_at = [x](int k) {
      return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
    };
    prepare(bits_at, size, to, stride, sum);
  }

  static void prepare_bf16(const uint16_t* x, int size, uint16_t* to, int stride, float* sum) {
    const auto bits_at = [x](int k) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    };
    prepare(bits_at, size, to, stride, sum);
  }

  template <class BitsAt>
  static void prepare(const BitsAt& bits_at, int size, uint16_t* to, int stride, float* sum) {
    // The order within a step in which the nibbles of a lane pair up: see `pairs_at`.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m512 total = _mm512_setzero_ps();
    for (int k = 0; k < size; k += kLanes, to += 2 * stride) {
      const __m256i bits = bits_at(k);
      const __m256i steps = _mm256_shuffle_epi8(bits, order);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(steps));
      if (sum) {
        const __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        total = _mm512_add_ps(total, _mm512_castsi512_ps(rounded));
      }
      if (k + kStep == size) continue;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride), _mm256_extracti128_si256(steps, 1));
    }
    if (sum) *sum = _mm512_reduce_add_ps(total);
  }

  // Two bfloat16 (q − 8) for each output: the low nibbles of both 16-bit halves after a shift. They
  // are the inputs (k, k + 2), (k + 4, k + 6), (k + 1, k + 3) and (k + 5, k + 7).
  static __m512i pairs_at(const uint8_t* codes, int pair) {
    const __m512i table = _mm512_broadcast_i64x4(values());
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(load(codes), 4 * pair), table);
  }

  static __m256i values() {
    alignas(32) static constexpr uint16_t bits[16] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 .. -1
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 .. 7
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
  }

  template <int R, bool Symmetric>
  static void multiply(const Span& span, float* outputs) {
    for_groups<R, Symmetric>(span, outputs, [&](const Group& group, const TileGroup& tile,
                                                __m512(&totals)[R][kVectors]) {
      __m512 sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = _mm512_setzero_ps(); });
      });
      const uint8_t* x = tile.values;
      const uint8_t* codes = group.codes;
      for (int step = 0; step < span.steps; ++step, x += 2 * kStep * R, codes += 4 * kColumns) {
        unrolled<4>([&](auto pair) {
          __m512i q[kVectors];
          unrolled<kVectors>([&](auto v) { q[v] = pairs_at(codes + 64 * v, pair); });
          unrolled<R>([&](auto r) {
            const __m512i value = broadcast(x + 2 * kStep * r + 4 * pair);
            unrolled<kVectors>([&](auto v) { sums[r][v] = dot_bf16(sums[r][v], q[v], value); });
          });
        });
        prefetch(codes);
      }
      unrolled<kVectors>([&](auto v) {
        const __m512 scales = scales_at(group, v);
        __m512 offset;
        if constexpr (!Symmetric) {
          offset = _mm512_sub_ps(_mm512_set1_ps(8), zero_points_at(group, v));
        }
        unrolled<R>([&](auto r) {
          __m512 product = sums[r][v];
          if constexpr (!Symmetric) {
            product = _mm512_fmadd_ps(offset, _mm512_set1_ps(tile.sums[r]), product);
          }
          totals[r][v] = _mm512_fmadd_ps(product, scales, totals[r][v]);
        });
      });
    });
  }
};

}  // namespace

const InstructionSet* avx512() {
  static const InstructionSet set{"avx512", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows};
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return has ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx512() { return nullptr; }
}  // namespace fxquant

#endif
