// A call of attention as callers from outside give it: tensors whose shapes need not belong together.
#pragma once

#include "attention.h"

namespace fxquant {

// A tensor of any number of dimensions.
struct View {
  void* data;
  int64_t dimensions;
  const int64_t *sizes, *strides;  // strides in elements
};

// Queries, keys and values [batch, heads, rows, columns] whose columns lie together, a mask that
// broadcasts to [batch, heads, queries, keys], and y, contiguous [batch, queries, heads, value width].
// Fills in all but type, causal, scale and threads; false where the shapes do not belong together.
inline bool read_tensors(const View& q, const View& k, const View& v, void* y, const View& mask,
                         MaskType mask_type, Attention* call) {
  for (const View* tensor : {&q, &k, &v}) {
    if (tensor->dimensions != 4) return false;
    for (int i = 0; i < 4; ++i) {
      if (tensor->sizes[i] <= 0) return false;
    }
    if (tensor->strides[3] != 1 && tensor->sizes[3] != 1) return false;
  }
  const auto matrices = [](const View& tensor) {
    return Matrices{static_cast<uint8_t*>(tensor.data), tensor.strides[0], tensor.strides[1],
                    tensor.strides[2]};
  };
  call->q = matrices(q), call->k = matrices(k), call->v = matrices(v);
  call->batch = q.sizes[0], call->heads = q.sizes[1], call->key_heads = k.sizes[1];
  call->queries = q.sizes[2], call->keys = k.sizes[2];
  call->width = q.sizes[3], call->value_width = v.sizes[3];
  call->y = {static_cast<uint8_t*>(y), call->queries * call->heads * call->value_width,
             call->value_width, call->heads * call->value_width};
  if (call->heads % call->key_heads != 0 || k.sizes[0] != call->batch ||
      k.sizes[3] != call->width || v.sizes[0] != call->batch || v.sizes[1] != call->key_heads ||
      v.sizes[2] != call->keys) {
    return false;
  }

  call->mask = {static_cast<const uint8_t*>(mask.data), mask_type, 0, 0, 0, 0};
  if (mask_type == MaskType::none) return true;
  if (mask.dimensions > 4) return false;
  const int64_t wanted[4] = {call->batch, call->heads, call->queries, call->keys};
  int64_t strides[4] = {};
  for (int64_t i = 0; i < mask.dimensions; ++i) {
    const int64_t to = 4 - mask.dimensions + i;
    if (mask.sizes[i] != wanted[to] && mask.sizes[i] != 1) return false;
    strides[to] = mask.sizes[i] == 1 ? 0 : mask.strides[i];
  }
  call->mask.batch_stride = strides[0], call->mask.head_stride = strides[1];
  call->mask.row_stride = strides[2], call->mask.column_stride = strides[3];
  return true;
}

}  // namespace fxquant
