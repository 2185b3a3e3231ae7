// Activations and codes as pairs of bfloat16, as the instructions take them that multiply those.
#pragma once

#include "avx512.h"

namespace fxquant {
namespace {

struct Bf16Pairs {
  using Value = uint16_t;  // bfloat16
  static constexpr int code_bytes = 2, float_tiles = 0;
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
      if (k + KR == size) continue;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride), _mm256_extracti128_si256(steps, 1));
    }
    if (sum) *sum = _mm512_reduce_add_ps(total);
  }

  // Two bfloat16 of a table for each output, q − 8 or the values of a code book: the low nibbles of both 16-bit halves after a shift. They
  // are the inputs (k, k + 2), (k + 4, k + 6), (k + 1, k + 3) and (k + 5, k + 7).
  static __m512i pairs_at(const uint8_t* codes, int pair, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(load(codes), 4 * pair), table);
  }

  // The table of nibbles, twice. Levels have 8 bits, which bfloat16 holds exactly.
  static __m512i table_of(const CodeBook* book) {
    alignas(32) static constexpr uint16_t bits[16] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 .. -1
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 .. 7
    __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
    if (book) values = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_load_ps(book->values)));
    return _mm512_broadcast_i64x4(values);
  }

  // Pairs of nibbles, in the order of `pairs_at`.
  static void unpack_nibbles(const uint8_t* codes, int inputs, const CodeBook* book,
                             uint8_t* pairs) {
    const __m512i table = table_of(book);
    for (int k = 0; k < inputs; k += KR, codes += kWord, pairs += 4 * kWord) {
      prefetch(codes + kAhead);
      unrolled<4>([&](auto pair) {
        for (int at = 0; at < kWord; at += 64) {
          _mm512_store_si512(pairs + kWord * pair + at, pairs_at(codes + at, pair, table));
        }
      });
    }
  }

  // Null for 4 bits, whose nibbles can be looked up where they are used.
  static UnpackBytes unpacking(const Weight& weight, int) {
    switch (weight.bits) {
      case 2: return unpack_pairs<2>;
      case 3: return unpack_pairs<3>;
      case 5: return unpack_pairs<5>;
      case 6: return unpack_pairs<6>;
      case 8: return unpack_pairs<8>;
      default: return nullptr;
    }
  }

  // bfloat16 pairs [inputs / 8][4][64] of q − middle, in the order of `pairs_at`.
  template <int Bits>
  static void unpack_pairs(const uint8_t* codes, int inputs, const CodeBook*, uint8_t* pairs) {
    constexpr int kUnit = unit_of(Bits), kUnitBytes = kUnit * NR * Bits / 8;
    alignas(64) uint8_t bytes[kUnit * NR];
    for (int done = 0; done < inputs; done += kUnit, codes += kUnitBytes) {
      for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(codes + kAhead + line);
      unpack_unit<Bits>(codes, bytes);
      for (int step = 0; step < kUnit / KR; ++step, pairs += 4 * kWord) {
        for (int word = 0; word < 2; ++word) {
          const uint8_t* from = bytes + (2 * step + word) * kWord;
          for (int at = 0; at < kWord; at += 64) {
            const __m512i middles = _mm512_set1_epi8(static_cast<char>(1 << (Bits - 1)));
            const __m512i q = _mm512_sub_epi8(load(from + at), middles);
            const __m512i even = pair_of<0, 2>(q), odd = pair_of<1, 3>(q);
            _mm512_store_si512(pairs + kWord * word + at, even);
            _mm512_store_si512(pairs + kWord * (2 + word) + at, odd);
          }
        }
      }
    }
  }

  // Two signed bytes of each lane as bfloat16, exactly: the upper halves of two float32.
  template <int Low, int High>
  static __m512i pair_of(__m512i q) {
    const auto upper = [q](int byte) {
      const __m512i value = _mm512_srai_epi32(_mm512_slli_epi32(q, 24 - 8 * byte), 24);
      return _mm512_castps_si512(_mm512_cvtepi32_ps(value));
    };
    return _mm512_or_si512(_mm512_srli_epi32(upper(Low), 16), upper(High));
  }
};

}  // namespace
}  // namespace fxquant
