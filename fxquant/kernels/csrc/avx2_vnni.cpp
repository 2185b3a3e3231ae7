// AVX2 with FMA and AVX-VNNI.
#include "cpu.h"
#include "linear.h"
#include "rounding.h"
#include "targets.h"

#ifdef FXQUANT_X86

FXQUANT_TARGET("avx2,fma,f16c,avxvnni")

#define FXQUANT_AVX_VNNI
#include "avx2.h"

namespace fxquant {

const InstructionSet* avx2_vnni() {
  static constexpr InstructionSet set{"avx2_vnni", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return has_avx_vnni() ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx2_vnni() { return nullptr; }
}  // namespace fxquant

#endif
