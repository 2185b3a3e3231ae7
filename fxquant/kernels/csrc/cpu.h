// What this CPU and its operating system can run. Compiled for any CPU, unlike the code that asks.
#pragma once

namespace fxquant {

bool has_avx2();  // with FMA and F16C
bool has_avx_vnni();
bool has_avx512_vnni();  // with F, BW, VL and DQ
bool has_avx512_bf16();
// With tiles of bfloat16 and int8. Linux lets a process use them when asked once, which this does.
bool has_amx();

bool has_dot_product();  // of bytes, on 64-bit Arm

}  // namespace fxquant
