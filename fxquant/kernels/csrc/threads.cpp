#include "threads.h"

#include <pthread.h>
#include <stdlib.h>
#include <strings.h>

namespace fxquant {
namespace {

bool forked = false;

const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Until a thread works: it either spins, as is usual, or sleeps.
double wake_up_nanoseconds() {
  const char* policy = getenv("OMP_WAIT_POLICY");
  return policy && strcasecmp(policy, "passive") == 0 ? 45000 : 10000;
}

}  // namespace

int threads_for(double nanoseconds, int wanted) {
  static const double wake_up = wake_up_nanoseconds();  // OpenMP reads the policy once, too
  return forked || nanoseconds < 2 * wake_up ? 1 : wanted;
}

Scratch::~Scratch() { free(memory_); }

uint8_t* Scratch::take(size_t bytes) {
  if (bytes > bytes_) {
    free(memory_);
    if (posix_memalign(&memory_, 64, bytes) != 0) memory_ = nullptr;
    bytes_ = memory_ ? bytes : 0;
  }
  return static_cast<uint8_t*>(memory_);
}

}  // namespace fxquant
