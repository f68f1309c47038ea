// Scaled dot-product attention of queries, keys and values that lie side by side, and its gradient.

#pragma once

#include "cpu/isa.h"
#include "math/scalar.h"

namespace alignfast {

// Dense [N, tokens, 3, heads, width] of queries, keys and values, and [N, tokens, heads, width] of what comes out.
struct AttentionPass {
  Dtype dtype;
  int64_t tokens, heads, width;
  const void* packed;
  // Written, or null for the gradient.
  void* result;
  // [N, heads, tokens, 2], in the wide type: the largest product of each query, and the sum of the powers of all less
  // that. Written with the result, read for the gradient.
  void* sums;
  // Of the result, and of `packed`, which is written.
  const void* grad;
  void* for_packed;
};

// Heads begin .. end of those of all images.
AF_DECLARE_KERNEL(void, attention_heads, const AttentionPass& pass, int64_t begin, int64_t end)
AF_DECLARE_KERNEL(void, attention_gradients, const AttentionPass& pass, int64_t begin, int64_t end)

}  // namespace alignfast
