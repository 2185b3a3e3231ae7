// How integers of 2 to 8 bits lie in memory, and the one unpacking of them.
//
// A width is a sum of fields: 4, 2 or 8 bits, or 4 or 2 bits and the remaining upper ones. A word is
// uint32 [64], a lane for each output, and holds a field of 32 / (field bits) inputs: byte j of a lane
// has input j in its lowest bits, then input 4 + j, and so on. So a shift and a mask give the field of
// four inputs as the four bytes of a lane. Fields are written unit by unit, the lower field's words
// first; a unit has as many inputs as fill a word of its narrowest field.
//
//   bits  fields  inputs of a unit  words of a unit
//    2     2           16               1
//    3     2, 1        32               2, 1
//    4     4            8               1
//    5     4, 1        32               4, 1
//    6     4, 2        16               2, 1
//    8     8            8               2 (four inputs each)
//
// Codes of a code book are unpacked by a table of 16 bytes to its levels, which are multiplied as 8-bit
// integers are.
#pragma once

#include "linear.h"
#include "unrolled.h"

namespace fxquant {
namespace {

constexpr int kWord = NR * 4;  // bytes
constexpr int kFour = 4;             // inputs in the bytes of a lane

constexpr int low_field(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

constexpr int high_field(int bits) { return bits - low_field(bits); }

// Inputs of a unit.
constexpr int unit_of(int bits) {
  const int narrowest = high_field(bits) ? high_field(bits) : low_field(bits);
  return narrowest == 8 ? KR : 32 / narrowest;
}

// The bytes of all lanes that have the lowest `bits` set.
constexpr uint32_t bytes_of(int bits) { return ((1u << bits) - 1) * 0x01010101u; }

// The field of `Bits` bits of the inputs 4 · four .. 4 · four + 3 of a lane, moved up by `Up`.
template <int Bits, int Up>
inline uint32_t field_at(const uint32_t* words, int lane, int four) {
  constexpr int kFours = 8 / Bits;
  const uint32_t word = words[four / kFours * NR + lane];
  const int down = four % kFours * Bits - Up;
  return (down >= 0 ? word >> down : word << -down) & (bytes_of(Bits) << Up);
}

// Bytes as 8-bit weights have them, uint32 [inputs / 4][64], of the integers of one unit.
template <int Bits>
inline void unpack_unit(const uint8_t* codes, uint8_t* bytes) {
  constexpr int kLow = low_field(Bits), kHigh = high_field(Bits), kUnit = unit_of(Bits);
  const auto* low = reinterpret_cast<const uint32_t*>(codes);
  const uint32_t* high = low + kUnit * kLow / 32 * NR;
  auto* to = reinterpret_cast<uint32_t*>(bytes);
  unrolled<kUnit / kFour>([&](auto four) {
    for (int lane = 0; lane < NR; ++lane) {
      uint32_t four_codes = field_at<kLow, 0>(low, lane, four);
      if constexpr (kHigh > 0) four_codes |= field_at<kHigh, kLow>(high, lane, four);
      to[four * NR + lane] = four_codes;
    }
  });
}

// What memory is asked for ahead of use, so that its latency is hidden when each weight is used once.
constexpr int kAhead = 8192;

template <int Bits>
void unpack_bytes_of(const uint8_t* codes, int inputs, const CodeBook*, uint8_t* bytes) {
  constexpr int kUnit = unit_of(Bits), kUnitBytes = kUnit * NR * Bits / 8;
  for (int done = 0; done < inputs; done += kUnit, codes += kUnitBytes, bytes += kUnit * NR) {
    for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(codes + kAhead + line);
    unpack_unit<Bits>(codes, bytes);
  }
}

// The levels of a word of nibbles: two words of bytes.
inline void look_up(const uint8_t* codes, const CodeBook* book, uint8_t* bytes) {
#if defined(FXQUANT_AVX512)
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(book->levels));
  const __m512i table = _mm512_broadcast_i32x4(levels), low = _mm512_set1_epi8(0xf);
  for (int at = 0; at < kWord; at += 64) {
    const __m512i q = _mm512_loadu_si512(codes + at);
    const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(q, 4), low);
    _mm512_storeu_si512(bytes + at, _mm512_shuffle_epi8(table, _mm512_and_si512(q, low)));
    _mm512_storeu_si512(bytes + kWord + at, _mm512_shuffle_epi8(table, upper));
  }
#elif defined(FXQUANT_AVX2)
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(book->levels));
  const __m256i table = _mm256_broadcastsi128_si256(levels), low = _mm256_set1_epi8(0xf);
  for (int at = 0; at < kWord; at += 32) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at));
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
    auto* to = reinterpret_cast<__m256i*>(bytes + at);
    _mm256_storeu_si256(to, _mm256_shuffle_epi8(table, _mm256_and_si256(q, low)));
    _mm256_storeu_si256(to + kWord / 32, _mm256_shuffle_epi8(table, upper));
  }
#elif defined(FXQUANT_NEON)
  const uint8x16_t table = vld1q_u8(book->levels), low = vdupq_n_u8(0xf);
  for (int at = 0; at < kWord; at += 16) {
    const uint8x16_t q = vld1q_u8(codes + at);
    vst1q_u8(bytes + at, vqtbl1q_u8(table, vandq_u8(q, low)));
    vst1q_u8(bytes + kWord + at, vqtbl1q_u8(table, vshrq_n_u8(q, 4)));
  }
#else
  for (int i = 0; i < kWord; ++i) {
    bytes[i] = book->levels[codes[i] & 0xf], bytes[kWord + i] = book->levels[codes[i] >> 4];
  }
#endif
}

inline void unpack_book(const uint8_t* codes, int inputs, const CodeBook* book, uint8_t* bytes) {
  constexpr int kUnit = unit_of(kBookBits);
  for (int done = 0; done < inputs; done += kUnit, codes += kWord, bytes += kUnit * NR) {
    for (int line = 0; line < kWord; line += 64) __builtin_prefetch(codes + kAhead + line);
    look_up(codes, book, bytes);
  }
}

using UnpackBytes = void (*)(const uint8_t* codes, int inputs, const CodeBook* book, uint8_t* bytes);

// Whether codes are integers of 4 bits: nibbles that are multiplied as they are.
inline bool has_nibbles(const Weight& weight) { return weight.bits == 4 && !weight.book; }

// Null where the codes are bytes already, and for nibbles.
inline UnpackBytes unpacking_of(const Weight& weight) {
  if (weight.book) return unpack_book;
  switch (weight.bits) {
    case 2: return unpack_bytes_of<2>;
    case 3: return unpack_bytes_of<3>;
    case 5: return unpack_bytes_of<5>;
    case 6: return unpack_bytes_of<6>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace fxquant
