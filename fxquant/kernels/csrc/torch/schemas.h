// What torch knows of the operators that an exported program may call. Python, where nothing may be
// compiled, says the same in kernels/native.py and kernels/attention.py; a test compares the two.
#pragma once

namespace fxquant {

constexpr const char* kLinearSchema =
    "linear_intn(Tensor x, Tensor weight, Tensor? bias, int in_features, int out_features,"
    " int bits, bool symmetric, bool int8_activations, int code_book=0) -> Tensor";

constexpr const char* kAttentionSchema =
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale)"
    " -> Tensor";

}  // namespace fxquant
