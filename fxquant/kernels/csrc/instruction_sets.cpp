// The instruction sets that there are: another one is added here and in linear.h.
#include "linear.h"

namespace fxquant {

const InstructionSets& instruction_sets() {
  static const InstructionSets sets{amx(),  avx512_bf16(), avx512_vnni(), avx2_vnni(),
                                    avx2(), neon_dot(),    neon(),        portable()};
  return sets;
}

const InstructionSet& fastest() {
  for (const InstructionSet* set : instruction_sets()) {
    if (set) return *set;
  }
  return *portable();
}

}  // namespace fxquant
