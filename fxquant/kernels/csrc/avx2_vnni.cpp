// AVX2 with FMA and AVX-VNNI.
#include "linear.h"
#include "targets.h"

#ifdef FXQUANT_X86

FXQUANT_TARGET("avx2,fma,f16c,avxvnni")

#define FXQUANT_AVX_VNNI
#include "avx2.h"

namespace fxquant {

const InstructionSet* avx2_vnni() {
  static const InstructionSet set{"avx2_vnni", kernel_of<FloatMode>(), kernel_of<Int8Mode>(),
                                  round_rows};
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avxvnni");
  return has ? &set : nullptr;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* avx2_vnni() { return nullptr; }
}  // namespace fxquant

#endif
