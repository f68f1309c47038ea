#include "cpu/inverted_residual.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "checks/dense.h"
#include "checks/depthwise.h"
#include "checks/interleaved.h"
#include "common.h"

namespace alignfast {
namespace {

const void* packed(const char* name, const Tensor& weight, const Tensor& images, const Sizes& shape) {
  check_device(name, weight, images);
  check_dtype(name, weight, wide_type(images));
  check_shape(name, weight, shape);
  check_dense(name, weight);
  return weight.const_data_ptr();
}

Tensor new_bits(const Sizes& shape, const Tensor& images) {
  const Tensor bits = dense(shape, ScalarType::Short, images);
  if (bits.numel() > 0) std::memset(bits.mutable_data_ptr(), 0, static_cast<size_t>(bits.numel()) * sizeof(uint16_t));
  return bits;
}

// The pass but for what goes in and comes out, with its weights.
ResidualPass pass_of(const Tensor& images, const Tensor& entering, const Tensor& depthwise, const Tensor& leaving,
                     int64_t between, int64_t channels, const Sizes& stride, const Sizes& padding) {
  const Dtype dtype = check_interleaved_images("images", images);
  check_shape("depthwise", depthwise, {-1, -1, -1, RESIDUAL_BLOCK});
  const int64_t blocks = depthwise.size(0);
  AF_CHECK((blocks - 1) * RESIDUAL_BLOCK < between && between <= blocks * RESIDUAL_BLOCK, "between: got ", between,
           "; allowed is what fills ", blocks, " blocks of ", RESIDUAL_BLOCK);
  const Sizes kernel = {depthwise.size(1), depthwise.size(2)};
  check_geometry(kernel, stride, padding);
  AF_CHECK(channels >= 1, "channels: got ", channels, "; allowed is at least 1");
  const int64_t padded = (channels + 15) / 16 * 16;
  ResidualPass pass{};
  pass.depthwise.kernel = {dtype,      packed("depthwise", depthwise, images, {blocks, -1, -1, RESIDUAL_BLOCK}),
                           {},         RESIDUAL_BLOCK,
                           kernel[0],  kernel[1],
                           stride[0],  stride[1],
                           padding[0], padding[2]};
  pass.in = images.const_data_ptr();
  pass.in_channels = images.size(1);
  pass.out_channels = channels;
  pass.padded_channels = padded;
  pass.between = between;
  pass.blocks = blocks;
  pass.entering = packed("entering", entering, images, {blocks, images.size(1), RESIDUAL_BLOCK});
  pass.leaving = packed("leaving", leaving, images, {blocks, RESIDUAL_BLOCK, padded});
  return pass;
}

void set_sizes(ResidualPass& pass, bool adjoint, const Sizes& in, const Sizes& out) {
  pass.depthwise.adjoint = adjoint;
  pass.depthwise.in_rows = in[0];
  pass.depthwise.in_columns = in[1];
  pass.depthwise.out_rows = out[0];
  pass.depthwise.out_columns = out[1];
}

// Whole images for each thread, or where there are fewer of them than threads, parts of images.
void run(const ResidualPass& pass, int64_t images) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min((threads + images - 1) / images, pass.depthwise.out_rows);
  const auto kernel = AF_KERNEL(inverted_residual_parts);
  torch::stable::parallel_for(0, images * parts, 1,
                              [&](int64_t begin, int64_t end) { kernel(pass, parts, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> inverted_residual(Tensor images, Tensor entering, Tensor entering_bias,
                                                     Tensor depthwise, Tensor depthwise_bias, Tensor leaving,
                                                     Tensor leaving_bias, int64_t between, int64_t channels,
                                                     Sizes stride, Sizes padding, double low, double high) {
  ResidualPass pass = pass_of(images, entering, depthwise, leaving, between, channels, stride, padding);
  check_clip("clip", low, high);
  const int64_t count = images.size(0), filled = pass.blocks * RESIDUAL_BLOCK;
  pass.entering_bias = packed("entering_bias", entering_bias, images, {filled});
  pass.depthwise_bias = packed("depthwise_bias", depthwise_bias, images, {filled});
  pass.leaving_bias = packed("leaving_bias", leaving_bias, images, {pass.padded_channels});
  const Sizes size = {images.size(2), images.size(3)};
  const Sizes shape = result_of(count, channels, size, {depthwise.size(1), depthwise.size(2)}, stride, padding);
  const Tensor out = interleaved(shape, images);
  const Tensor in_bits = new_bits({count, pass.blocks, size[0], size[1], RESIDUAL_WORDS}, images);
  const Tensor out_bits = new_bits({count, pass.blocks, shape[2], shape[3], RESIDUAL_WORDS}, images);
  if (out.numel() == 0) return {out, in_bits, out_bits};
  set_sizes(pass, false, size, {shape[2], shape[3]});
  pass.out = out.mutable_data_ptr();
  pass.in_bits = static_cast<uint16_t*>(in_bits.mutable_data_ptr());
  pass.out_bits = static_cast<uint16_t*>(out_bits.mutable_data_ptr());
  pass.range = range_of(images.scalar_type() == ScalarType::Double ? Dtype::float64 : Dtype::float32, low, high);
  run(pass, count);
  return {out, in_bits, out_bits};
}

Tensor inverted_residual_linear(Tensor images, Tensor entering, Tensor depthwise, Tensor leaving, Tensor in_bits,
                                Tensor out_bits, int64_t between, int64_t channels, Sizes size, Sizes stride,
                                Sizes padding, bool adjoint) {
  ResidualPass pass = pass_of(images, entering, depthwise, leaving, between, channels, stride, padding);
  check_sizes("size", size, 2, 0);
  const int64_t count = images.size(0);
  const Sizes shape = result_of(count, channels, size, {depthwise.size(1), depthwise.size(2)}, stride, padding);
  const Sizes small = {shape[2], shape[3]};
  const Sizes &in = adjoint ? small : size, &wanted = adjoint ? size : small;
  check_shape("images", images, {count, -1, in[0], in[1]});
  pass.in_bits = bits_in("in_bits", in_bits, images, {count, pass.blocks, in[0], in[1], RESIDUAL_WORDS});
  pass.out_bits = bits_in("out_bits", out_bits, images, {count, pass.blocks, wanted[0], wanted[1], RESIDUAL_WORDS});
  pass.gated = true;
  const Tensor out = interleaved({count, channels, wanted[0], wanted[1]}, images);
  if (out.numel() == 0) return out;
  set_sizes(pass, adjoint, in, wanted);
  pass.out = out.mutable_data_ptr();
  run(pass, count);
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&alignfast::inverted_residual));
  m.impl("inverted_residual_linear", TORCH_BOX(&alignfast::inverted_residual_linear));
}
