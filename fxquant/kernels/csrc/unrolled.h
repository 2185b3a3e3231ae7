// Loops that are gone before the compiler assigns registers.
#pragma once

#include <type_traits>

#if defined(__GNUC__)
#define FXQUANT_INLINE __attribute__((always_inline)) inline
#else
#define FXQUANT_INLINE inline
#endif

namespace fxquant {
namespace {

// Calls `body` with the constants 0 .. N - 1. GCC keeps an array in registers only if every index is
// a constant from the start.
template <int I, int N, class Body>
FXQUANT_INLINE void unrolled_from(const Body& body) {
  if constexpr (I < N) {
    body(std::integral_constant<int, I>());
    unrolled_from<I + 1, N>(body);
  }
}

template <int N, class Body>
FXQUANT_INLINE void unrolled(const Body& body) {
  unrolled_from<0, N>(body);
}

}  // namespace
}  // namespace fxquant
