// NEON with the dot product of bytes (FEAT_DotProd).
#include "cpu.h"
#include "linear.h"
#include "rounding.h"
#include "targets.h"

#ifdef FXQUANT_ARM

#include <arm_neon.h>  // not compiled for more instructions itself

FXQUANT_TARGET(FXQUANT_DOT_PRODUCT)

#define FXQUANT_ARM_DOT
#include "neon.h"

namespace fxquant {

const InstructionSet* neon_dot() {
  static constexpr InstructionSet set{"neon_dot", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                      round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return has_dot_product() ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* neon_dot() { return nullptr; }
}  // namespace fxquant

#endif
