// The values of a packed weight.
#pragma once

#include "linear.h"

namespace fxquant {

// Writes scale · (code − zero point) as float32 [out, in].
void dequantize(const Weight& weight, float* to, int threads);

}  // namespace fxquant
