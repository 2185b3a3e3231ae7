// AVX-512 with VNNI, for CPUs without products of bfloat16: float activations stay float32.
#include "cpu.h"
#include "linear.h"
#include "rounding.h"
#include "targets.h"

#ifdef FXQUANT_X86

#include <immintrin.h>  // not compiled for more instructions itself

FXQUANT_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

#include "avx512.h"
#include "attention_rows.h"
#include "norm_rows.h"
#include "rounding_rows.h"

namespace fxquant {
namespace {

struct FloatMode : ByteCodes {
  // Null for 4 bits, whose nibbles are looked up where they are used.
  static UnpackBytes unpacking(const Weight& weight, int) {
    return weight.bits == 4 ? nullptr : unpacking_of(weight);
  }

  using Value = float;
  static constexpr int MR = 6, speed = 120;
  static constexpr bool sums_may_cancel = true;

  static void prepare_group(const float* x, int size, float* to, int stride, float*, float* sum) {
    prepare_float32(x, size, to, stride, sum);
  }

  // The values of nibbles.
  static __m512 table_of(const CodeBook* book) {
    if (book) return _mm512_load_ps(book->values);
    return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  }

  // q − middle of one input of a step, for 16 outputs; that of nibbles is in the table.
  template <bool Bytes>
  static __m512 weights_at(const uint8_t* codes, int vector, int k, int middle, __m512 table) {
    if (Bytes) {
      const __m512i lanes = load(codes + k / kFour * kWord + 64 * vector);
      const __m512i q = _mm512_sub_epi8(lanes, _mm512_set1_epi8(static_cast<char>(middle)));
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, 24 - 8 * (k % kFour)), 24));
    }
    // Of an index, only the low four bits count.
    const __m512i lanes = load(codes + 64 * vector);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 8 * (k % kFour) + 4 * (k / kFour)), table);
  }

  template <int R, bool Bytes>
  static void multiply(const Span& span, float* outputs) {
    for_groups<R>(span, outputs, [&](const Group& group, const TileGroup& tile,
                                     __m512(&totals)[R][kVectors]) {
      __m512 sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = _mm512_setzero_ps(); });
      });
      const auto* x = reinterpret_cast<const float*>(tile.values);
      const uint8_t* codes = group.codes;
      const __m512 table = table_of(span.book);
      for (int step = 0; step < span.steps; ++step, x += KR * R) {
        unrolled<KR>([&](auto k) {
          __m512 w[kVectors];
          unrolled<kVectors>(
              [&](auto v) { w[v] = weights_at<Bytes>(codes, v, k, group.middle, table); });
          unrolled<R>([&](auto r) {
            const __m512 value = _mm512_set1_ps(x[KR * r + k]);
            unrolled<kVectors>([&](auto v) { sums[r][v] = fma(w[v], value, sums[r][v]); });
          });
        });
        for (int word = 0; word < (Bytes ? 2 : 1); ++word, codes += kWord) {
          prefetch(codes + span.ahead);
        }
      }
      add_sums<R>(group, tile, sums, totals);
    });
  }

  // Inline assembly for the same reason as that of `dot_int8`.
  static __m512 fma(__m512 w, __m512 x, __m512 sum) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

}  // namespace

const InstructionSet* avx512_vnni() {
  static constexpr InstructionSet set{"avx512_vnni", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return has_avx512_vnni() ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx512_vnni() { return nullptr; }
}  // namespace fxquant

#endif
