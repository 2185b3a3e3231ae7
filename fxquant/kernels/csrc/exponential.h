// Functions of float32 that need the exponential, for the `Floats` of any CPU.
#pragma once

#include <initializer_list>

namespace fxquant {
namespace {

// 2^x within 2e-7 of its value; 0 below −127, infinite from 127.5 on.
inline Floats exp2_of(Floats x) {
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to a whole number in the last bits
  x = smallest(all_floats(128.0f), largest(all_floats(-127.0f), x));
  const Floats shifted = add(x, all_floats(kShift));
  const Floats rest = subtract(x, subtract(shifted, all_floats(kShift)));
  // The series of 2^rest, |rest| <= 1/2: ln(2)^k / k!
  Floats sum = all_floats(0.00015403530f);
  for (const float factor : {0.0013333558f, 0.0096181291f, 0.055504109f, 0.24022651f, 0.69314718f, 1.0f}) {
    sum = fma(sum, rest, all_floats(factor));
  }
  return times(sum, power_of_two(shifted));
}

}  // namespace
}  // namespace fxquant
