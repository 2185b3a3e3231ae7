#include "threads.h"

#include <pthread.h>
#include <stdlib.h>

namespace fxquant {
namespace {

bool forked = false;

const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int threads_left(int wanted) { return forked ? 1 : wanted; }

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
