// NEON, which every 64-bit Arm CPU has.
#include "linear.h"
#include "rounding.h"
#include "targets.h"

#ifdef FXQUANT_ARM

#include "neon.h"

namespace fxquant {

const InstructionSet* neon() {
  static constexpr InstructionSet set{"neon", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                      round_rows,
                                  attend, attention_scratch_bytes, norm_rows, norm_scratch_bytes,
                                  convolve_rows<ByteDots>, convolution_bytes<ByteDots>};
  return &set;
}

}  // namespace fxquant

#else

namespace fxquant {
const InstructionSet* neon() { return nullptr; }
}  // namespace fxquant

#endif
