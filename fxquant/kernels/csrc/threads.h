// What work shared among threads needs: whether there are any, and memory of their own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fxquant {

// How many threads to give work that takes one of them so many nanoseconds: `wanted`, or 1 where the
// others would wake up too late. OpenMP's threads do not survive a fork.
int threads_for(double nanoseconds, int wanted);

// Memory aligned to 64 bytes that grows as it is needed.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // Null when memory runs out; what was taken before is gone.
  uint8_t* take(size_t bytes);

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fxquant
