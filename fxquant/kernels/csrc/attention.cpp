// Shares heads, and chunks of their queries, among threads.
#include "attention.h"

#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fxquant {
namespace {

bool attend(const Attention& call, const InstructionSet& set, int64_t first, int64_t last) {
  static thread_local Scratch scratch;
  uint8_t* memory = scratch.take(set.attention_scratch_bytes(call));
  if (!memory) return false;
  set.attend(call, first, last, memory);
  return true;
}

}  // namespace

bool attention(const Attention& call, const InstructionSet& set) {
  const int64_t units = call.units();
  bool done = true;
#ifdef _OPENMP
  constexpr double kProduct = 0.05;  // nanoseconds
  const double products = static_cast<double>(call.batch) * call.heads * call.queries * call.keys *
                          (call.width + call.value_width);
  const int team = threads_for(kProduct * products, call.threads);
#pragma omp parallel num_threads(team) reduction(&& : done) if (team > 1)
  {
    const int64_t number = omp_get_thread_num(), count = omp_get_num_threads();
    done = attend(call, set, units * number / count, units * (number + 1) / count);
  }
#else
  done = attend(call, set, 0, units);
#endif
  return done;
}

}  // namespace fxquant
