// AVX2 with FMA.
#include "linear.h"
#include "targets.h"

#ifdef FXQUANT_X86

FXQUANT_TARGET("avx2,fma,f16c")

#include "avx2.h"

namespace fxquant {

const InstructionSet* avx2() {
  static const InstructionSet set{"avx2", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows};
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  return has ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx2() { return nullptr; }
}  // namespace fxquant

#endif
