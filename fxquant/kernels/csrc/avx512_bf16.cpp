// AVX-512 with VNNI and BF16: float activations are multiplied as bfloat16.
#include "cpu.h"
#include "linear.h"
#include "rounding.h"
#include "targets.h"

#ifdef FXQUANT_X86

#include <immintrin.h>  // not compiled for more instructions itself

FXQUANT_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")

#define FXQUANT_AVX512_BF16
#include "avx512.h"
#include "attention_rows.h"
#include "bf16_pairs.h"
#include "norm_rows.h"
#include "rounding_rows.h"

namespace fxquant {
namespace {

inline __m512 dot_bf16(__m512 sum, __m512i codes, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}

struct FloatMode : Bf16Pairs, OneByOne {
  static constexpr int MR = 6, speed = 230;

  template <int R, bool Bytes>
  static void multiply(const Span& span, float* outputs) {
    for_groups<R>(span, outputs, [&](const Group& group, const TileGroup& tile,
                                     __m512(&totals)[R][kVectors]) {
      __m512 sums[R][kVectors];
      unrolled<R>([&](auto r) {
        unrolled<kVectors>([&](auto v) { sums[r][v] = _mm512_setzero_ps(); });
      });
      const uint8_t* x = tile.values;
      const uint8_t* codes = group.codes;
      const __m512i table = table_of(span.book);
      for (int step = 0; step < span.steps; ++step, x += 2 * KR * R) {
        unrolled<4>([&](auto pair) {
          __m512i q[kVectors];
          unrolled<kVectors>([&](auto v) {
            q[v] = Bytes ? load(codes + kWord * pair + 64 * v) : pairs_at(codes + 64 * v, pair, table);
          });
          unrolled<R>([&](auto r) {
            const __m512i value = broadcast(x + 2 * KR * r + 4 * pair);
            unrolled<kVectors>([&](auto v) { sums[r][v] = dot_bf16(sums[r][v], q[v], value); });
          });
        });
        if (!Bytes) prefetch(codes + span.ahead);
        codes += (Bytes ? 4 : 1) * kWord;
      }
      add_sums<R>(group, tile, sums, totals);
    });
  }
};

}  // namespace

const InstructionSet* avx512_bf16() {
  static constexpr InstructionSet set{"avx512_bf16", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return has_avx512_bf16() ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx512_bf16() { return nullptr; }
}  // namespace fxquant

#endif
