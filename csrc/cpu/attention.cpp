#include "cpu/attention.h"

#include <tuple>

#include "checks/dense.h"
#include "common.h"

namespace alignfast {
namespace {

AttentionPass pass_of(const Tensor& packed) {
  check_here("packed", packed);
  check_shape("packed", packed, {-1, -1, 3, -1, -1});
  const Dtype dtype = floating_dtype("packed", packed.scalar_type());
  check_dense("packed", packed);
  AttentionPass pass{};
  pass.dtype = dtype;
  pass.tokens = packed.size(1);
  pass.heads = packed.size(3);
  pass.width = packed.size(4);
  pass.packed = packed.const_data_ptr();
  return pass;
}

void run(void (*kernel)(const AttentionPass&, int64_t, int64_t), const AttentionPass& pass, int64_t images) {
  torch::stable::parallel_for(0, images * pass.heads, grain_of(pass.tokens * pass.tokens * pass.width),
                              [&](int64_t begin, int64_t end) { kernel(pass, begin, end); });
}

std::tuple<Tensor, Tensor> attention(Tensor packed) {
  AttentionPass pass = pass_of(packed);
  const Tensor result = dense({packed.size(0), pass.tokens, pass.heads * pass.width}, packed.scalar_type(), packed);
  const Tensor sums = dense({packed.size(0), pass.heads, pass.tokens, 2}, wide_type(packed), packed);
  if (packed.numel() == 0) return {result, sums};
  pass.result = result.mutable_data_ptr();
  pass.sums = sums.mutable_data_ptr();
  run(AF_KERNEL(attention_heads), pass, packed.size(0));
  return {result, sums};
}

Tensor attention_backward(Tensor grad, Tensor packed, Tensor sums) {
  AttentionPass pass = pass_of(packed);
  check_device("grad", grad, packed);
  check_dtype("grad", grad, packed.scalar_type());
  check_shape("grad", grad, {packed.size(0), pass.tokens, pass.heads * pass.width});
  check_dense("grad", grad);
  check_device("sums", sums, packed);
  check_dtype("sums", sums, wide_type(packed));
  check_shape("sums", sums, {packed.size(0), pass.heads, pass.tokens, 2});
  check_dense("sums", sums);
  const Tensor out = dense({packed.size(0), pass.tokens, 3, pass.heads, pass.width}, packed.scalar_type(), packed);
  if (packed.numel() == 0) return out;
  pass.grad = grad.const_data_ptr();
  pass.sums = const_cast<void*>(sums.const_data_ptr());
  pass.for_packed = out.mutable_data_ptr();
  run(AF_KERNEL(attention_gradients), pass, packed.size(0));
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("attention", TORCH_BOX(&alignfast::attention));
  m.impl("attention_backward", TORCH_BOX(&alignfast::attention_backward));
}
