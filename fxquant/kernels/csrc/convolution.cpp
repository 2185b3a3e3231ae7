// Shares the work of a convolution among threads.
#include "convolution.h"

#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fxquant {
namespace {

bool convolve_share(const Convolution& call, const InstructionSet& set, Share share) {
  static thread_local Scratch scratch;
  uint8_t* memory = scratch.take(set.convolution_scratch_bytes(call));
  if (!memory) return false;
  set.convolve(call, share, memory);
  return true;
}

}  // namespace

bool convolve(const Convolution& call, const InstructionSet& set, int threads) {
  if (call.rows() == 0) return true;
  bool done = true;
#ifdef _OPENMP
  constexpr double kPrepare = 0.05, kFinish = 0.3;  // nanoseconds an input and an output
  const double rows = static_cast<double>(call.rows()), inputs = static_cast<double>(call.inputs());
  const double products = rows * inputs * call.outputs / set.int8_kernel.speed;
  const double others = rows * (kPrepare * inputs + kFinish * call.outputs);
  const int team = threads_for(products + others, threads);
#pragma omp parallel num_threads(team) reduction(&& : done) if (team > 1)
  done = convolve_share(call, set, {omp_get_thread_num(), omp_get_num_threads()});
#else
  (void)threads;
  done = convolve_share(call, set, {0, 1});
#endif
  return done;
}

}  // namespace fxquant
