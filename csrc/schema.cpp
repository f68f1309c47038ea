// Every op of the library, one line each.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(alignfast, m) {
  m.def(
      "kl_div_with_logits(Tensor student, Tensor teacher, float temperature, str direction, str reduction, "
      "str combine, bool with_gradient) -> (Tensor loss, Tensor gradient)");
  m.def("kl_div_with_logits_backward(Tensor grad, Tensor gradient, Tensor student) -> Tensor");
  m.def(
      "diversify(Tensor images, int copies, float noise_radius, int[] noise_key, Tensor? noise_images, "
      "Tensor? noise_copies, Tensor? pool, Tensor? partner, Tensor? weight, Tensor? scale, Tensor? resized, "
      "Tensor? top, Tensor? left, int padded, Tensor? mean, Tensor? std, ScalarType dtype, bool channels_last, "
      "Tensor? noise_step=None) -> Tensor");
  m.def(
      "diversify_backward(Tensor grad, int copies, Tensor? scale, Tensor? resized, Tensor? top, Tensor? left, "
      "int padded, Tensor? std, ScalarType dtype) -> Tensor");
  m.def(
      "sign_step(Tensor(a!) adv, Tensor images, Tensor grad, Tensor(b!)? momentum, float alpha, float eps, "
      "float decay, float low, float high, str norm) -> ()");
  m.def("attention(Tensor packed) -> (Tensor result, Tensor sums)");
  m.def("attention_backward(Tensor grad, Tensor packed, Tensor sums) -> Tensor");
  m.def(
      "basic_block(Tensor images, Tensor first, Tensor? first_bias, Tensor second, Tensor? second_bias) "
      "-> (Tensor result, Tensor first_bits, Tensor second_bits)");
  m.def(
      "basic_block_linear(Tensor images, Tensor first, Tensor second, Tensor first_bits, Tensor second_bits, "
      "bool adjoint) -> Tensor");
  m.def(
      "batch_norm(Tensor images, Tensor weight, Tensor bias, float eps, float low, float high) "
      "-> (Tensor result, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor images, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
      "float eps, float low, float high) -> (Tensor images, Tensor weight, Tensor bias)");
  m.def(
      "depthwise_conv2d(Tensor images, Tensor weight, Tensor? bias, int[] stride, int[] padding, float low_before, "
      "float high_before, float low_after, float high_after) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor weight, Tensor? images, Tensor? result, int[] size, int[] stride, "
      "int[] padding, float low_before, float high_before, float low_after, float high_after) -> Tensor");
  m.def("depthwise_conv2d_weight(Tensor grad, Tensor images, int[] size, int[] stride, int[] padding) -> Tensor");
  m.def(
      "inverted_residual(Tensor images, Tensor entering, Tensor entering_bias, Tensor depthwise, "
      "Tensor depthwise_bias, Tensor leaving, Tensor leaving_bias, int between, int channels, int[] stride, int[] "
      "padding, "
      "float low, float high) -> (Tensor result, Tensor in_bits, Tensor out_bits)");
  m.def(
      "inverted_residual_linear(Tensor images, Tensor entering, Tensor depthwise, Tensor leaving, Tensor in_bits, "
      "Tensor out_bits, int between, int channels, int[] size, int[] stride, int[] padding, bool adjoint) -> Tensor");
  m.def("smooth(Tensor grad, Tensor kernel) -> Tensor");
  m.def("smooth_backward(Tensor grad, Tensor kernel) -> Tensor");
  m.def(
      "philox_uniform(Tensor images, Tensor copies, int[] shape, int seed_low, int seed_high, int step, int purpose, "
      "float low, float high, Tensor? step_offset=None) -> Tensor");
  m.def("winograd_conv2d(Tensor images, Tensor weight, Tensor? bias, int[] padding, bool adjoint) -> Tensor");
}
