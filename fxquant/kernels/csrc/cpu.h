// What this CPU and its operating system can run. Compiled for any CPU, unlike the code that asks.
#pragma once

namespace fxquant {

bool has_avx2();  // with FMA and F16C
bool has_avx_vnni();
bool has_avx512_vnni();  // with F, BW, VL and DQ
bool has_avx512_bf16();

bool has_dot_product();  // of bytes, on 64-bit Arm

}  // namespace fxquant
