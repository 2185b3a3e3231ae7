// Shares rows among threads.
#include "norm.h"

#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fxquant {
namespace {

bool norm_share(const Norm& call, const InstructionSet& set, int64_t number, int64_t team) {
  static thread_local Scratch scratch;
  uint8_t* memory = scratch.take(set.norm_scratch_bytes(call));
  if (!memory) return false;
  set.norm_rows(call, call.rows * number / team, call.rows * (number + 1) / team, memory);
  return true;
}

}  // namespace

bool norm(const Norm& call, const InstructionSet& set, int threads) {
  bool done = true;
#ifdef _OPENMP
  constexpr double kElement = 0.5;  // nanoseconds
  const int team = threads_for(kElement * call.rows * call.columns, threads);
#pragma omp parallel num_threads(team) reduction(&& : done) if (team > 1)
  done = norm_share(call, set, omp_get_thread_num(), omp_get_num_threads());
#else
  (void)threads;
  done = norm_share(call, set, 0, 1);
#endif
  return done;
}

}  // namespace fxquant
