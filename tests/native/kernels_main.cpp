// Runs every kernel of one instruction set (-DAF_ISA=...) on fixed inputs, without torch, and prints a hash of what it
// gives. Processors and compilers are compared by this text, hence no input that leads to NaN, whose bits differ.

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/batch_norm.h"
#include "cpu/depthwise_conv2d.h"
#include "cpu/diversify.h"
#include "cpu/inverted_residual.h"
#include "cpu/kl_div_with_logits.h"
#include "cpu/philox_uniform.h"
#include "cpu/sign_step.h"
#include "cpu/smooth.h"
#include "cpu/winograd_conv2d.h"

namespace {

using namespace alignfast;

constexpr Dtype DTYPES[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return "float64";
    case Dtype::float32:
      return "float32";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::float16:
      break;
  }
  return "float16";
}

class Hash {
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
      value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
    }
  }
  void add(double x) { add(&x, sizeof(x)); }
  void print(const std::string& what) const { std::printf("%s %016llx\n", what.c_str(), value_); }

 private:
  unsigned long long value_ = 0xcbf29ce484222325u;
};

// Values of any dtype in [low, high), some of them made tiny and some zero.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count, double low, double high, uint32_t seed) : dtype_(dtype) {
    const PhiloxStream stream = philox_stream(seed, 0, 0, 0, 0);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t words[4];
      philox_block(stream, static_cast<uint32_t>(i), words);
      double value = low + static_cast<double>(unit_of(words[0])) * (high - low);
      if (words[1] % 8 == 0) value *= 0x1p-22;
      if (words[1] % 8 == 1) value = 0;
      append(value);
    }
  }

  void* data() { return bytes_.data(); }
  void add_to(Hash& hash) const { hash.add(bytes_.data(), bytes_.size()); }

 private:
  void append(double value) {
    switch (dtype_) {
      case Dtype::float64:
        return store(value);
      case Dtype::float32:
        return store(static_cast<float>(value));
      case Dtype::bfloat16:
        return store(narrow<BFloat16>(static_cast<float>(value)));
      case Dtype::float16:
        return store(narrow<Half>(static_cast<float>(value)));
    }
  }

  template <class T>
  void store(T value) {
    bytes_.resize(bytes_.size() + sizeof(T));
    std::memcpy(bytes_.data() + bytes_.size() - sizeof(T), &value, sizeof(T));
  }

  Dtype dtype_;
  std::vector<unsigned char> bytes_;
};

struct Shape {
  const char* name;
  ImageLayout layout;
  // Elements of the image, and of the memory it lies in.
  int64_t elements, extent;
};

constexpr Shape SHAPES[] = {
    {"pixel", {{1, 1, 1}, {1, 1, 1}, true}, 1, 1},
    {"odd", {{3, 7, 5}, {35, 5, 1}, true}, 105, 105},
    {"long", {{3, 31, 47}, {1457, 47, 1}, true}, 4371, 4371},
    {"strided", {{3, 31, 47}, {1, 282, 6}, false}, 4371, 8742},
};

void run_sign_step(Dtype dtype, const Shape& shape, bool moving) {
  Buffer adv(dtype, shape.extent, 0, 1, 1), image(dtype, shape.extent, 0, 1, 2);
  Buffer grad(dtype, shape.extent, -0.02, 0.02, 3), momentum(dtype, shape.extent, -1, 1, 4);
  const SignStepImage step{dtype,        adv.data(),   image.data(), grad.data(), moving ? momentum.data() : nullptr,
                           shape.layout, shape.layout, shape.layout, shape.layout};
  const SignStepConfig config{0.03, 0.11, 0.9, 0.0, 1.0};
  const int64_t begin = shape.elements / 3, end = shape.elements;
  Hash hash;
  hash.add(AF_ISA::sign_step_l1(step, begin, end));
  AF_ISA::sign_step_linf(step, config, 0.0123, begin, end);
  const double largest = AF_ISA::sign_step_direction(step, config, 0.0123, begin, end);
  hash.add(largest);
  const double length = AF_ISA::sign_step_length(step, largest, begin, end);
  hash.add(length);
  hash.add(AF_ISA::sign_step_l2_move(step, config, largest, length, begin, end));
  AF_ISA::sign_step_l2_project(step, config, 0.37, begin, end);
  adv.add_to(hash);
  momentum.add_to(hash);
  hash.print(std::string("sign_step ") + name_of(dtype) + " " + shape.name + (moving ? " momentum" : ""));
}

void run_kl_div_with_logits(Dtype dtype, int64_t classes, int64_t stride) {
  Buffer student(dtype, classes * stride, -9, 9, 1), teacher(dtype, classes * stride, -9, 9, 2);
  const bool float64 = dtype == Dtype::float64;
  for (const Direction direction : {Direction::forward, Direction::reverse, Direction::symmetric, Direction::jsd}) {
    const KlSample sample{
        {dtype, student.data(), stride}, {dtype, teacher.data(), stride}, classes, 2.5, direction, float64};
    Buffer gradient(float64 ? Dtype::float64 : Dtype::float32, classes, -1, 1, 3), result(dtype, classes, -1, 1, 4);
    Hash hash;
    hash.add(AF_ISA::kl_div_with_logits(sample, 0, false, nullptr));
    hash.add(AF_ISA::kl_div_with_logits(sample, 0.5, false, gradient.data()));
    hash.add(AF_ISA::kl_div_with_logits(sample, 0.25, true, gradient.data()));
    AF_ISA::kl_div_with_logits_backward(gradient.data(), float64, 0.7, dtype, classes, result.data());
    gradient.add_to(hash);
    result.add_to(hash);
    hash.print(std::string("kl_div_with_logits ") + name_of(dtype) + " " + std::to_string(classes) + " " +
               std::to_string(stride) + " " + std::to_string(static_cast<int>(direction)));
  }
}

// Planes of `height` rows, `step` values to a pixel, held `stride` apart.
void run_smooth(Dtype dtype, int64_t height, int64_t width, int64_t step, int64_t stride) {
  constexpr double KERNEL[] = {0.05, -0.1, 0.3, 0.4, 0.15, 0.07, 0.02};
  const int64_t length = width * step;
  Buffer in(dtype, height * length * stride, -1, 1, 1), out(dtype, height * length, -1, 1, 2);
  const SmoothPlane plane{dtype, in.data(), out.data(), height, length, step, length * stride, stride, KERNEL, 3};
  AF_ISA::smooth_rows(plane, 0, height);
  Hash hash;
  out.add_to(hash);
  hash.print(std::string("smooth ") + name_of(dtype) + " " + std::to_string(length) + " " + std::to_string(step) + " " +
             std::to_string(stride));
}

// Forward, back to the images, and back to the weight, of three images of 7 x 9 pixels and a 3 x 3 kernel.
void run_depthwise_conv2d(Dtype dtype, int64_t channels, int64_t stride) {
  constexpr int64_t COUNT = 3, ROWS = 7, COLUMNS = 9, SIDE = 3;
  const int64_t rows = (ROWS - 1) / stride + 1, columns = (COLUMNS - 1) / stride + 1;
  const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  Buffer images(dtype, COUNT * ROWS * COLUMNS * channels, -1, 1, 1), weight(dtype, channels * SIDE * SIDE, -1, 1, 2);
  Buffer bias(dtype, channels, -1, 1, 3), grad(dtype, COUNT * rows * columns * channels, -1, 1, 4);
  Buffer result(dtype, COUNT * rows * columns * channels, 0, 1, 5);
  Buffer for_images(dtype, COUNT * ROWS * COLUMNS * channels, 0, 1, 6);
  Buffer for_weight(dtype, channels * SIDE * SIDE, 0, 1, 7);
  Buffer packed(wide, channels * SIDE * SIDE, 0, 1, 8), sums(wide, 2 * channels * SIDE * SIDE, 0, 1, 9);
  const Range range{-0.25, 0.5};
  const DepthwiseKernel kernel{dtype, weight.data(), {SIDE * SIDE, SIDE, 1}, channels, SIDE, SIDE, stride, stride, 1,
                               1};
  AF_ISA::depthwise_pack(kernel, packed.data());
  const DepthwisePass forward{kernel,        false,   images.data(), nullptr, range,   ROWS,        COLUMNS,
                              result.data(), nullptr, range,         rows,    columns, bias.data(), 1};
  const DepthwisePass back{kernel,        true,  grad.data(), result.data(), range,   rows, columns, for_images.data(),
                           images.data(), range, ROWS,        COLUMNS,       nullptr, 0};
  AF_ISA::depthwise_rows(forward, packed.data(), 1, COUNT * rows);
  AF_ISA::depthwise_rows(back, packed.data(), 1, COUNT * ROWS);
  const DepthwiseWeightPass of_weight{kernel, images.data(), ROWS, COLUMNS, grad.data(), rows, columns};
  char* const second = static_cast<char*>(sums.data()) + channels * SIDE * SIDE * size_of(wide);
  AF_ISA::depthwise_weight_sums(of_weight, 0, 1, 0, channels, sums.data());
  AF_ISA::depthwise_weight_sums(of_weight, 1, COUNT, 0, channels, second);
  AF_ISA::depthwise_weight(kernel, sums.data(), 2, for_weight.data());
  Hash hash;
  result.add_to(hash);
  for_images.add_to(hash);
  for_weight.add_to(hash);
  hash.print(std::string("depthwise_conv2d ") + name_of(dtype) + " " + std::to_string(channels) + " " +
             std::to_string(stride));
}

// Forward and back again, of three images of 7 x 9 pixels, 3 x 3 kernels, and 70 channels between 5 and as many as
// given.
void run_inverted_residual(Dtype dtype, int64_t channels, int64_t stride) {
  constexpr int64_t COUNT = 3, ROWS = 7, COLUMNS = 9, SIDE = 3, FIRST = 5, BLOCKS = 2, BLOCK = RESIDUAL_BLOCK;
  const int64_t rows = (ROWS - 1) / stride + 1, columns = (COLUMNS - 1) / stride + 1;
  const int64_t padded = (channels + 15) / 16 * 16, back_padded = 16;
  const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  Buffer images(dtype, COUNT * ROWS * COLUMNS * FIRST, -1, 1, 1);
  Buffer grad(dtype, COUNT * rows * columns * channels, -1, 1, 2);
  Buffer entering(wide, BLOCKS * FIRST * BLOCK, -1, 1, 3), entering_bias(wide, BLOCKS * BLOCK, -1, 1, 4);
  Buffer depthwise(wide, BLOCKS * SIDE * SIDE * BLOCK, -1, 1, 5), depthwise_bias(wide, BLOCKS * BLOCK, -1, 1, 6);
  Buffer leaving(wide, BLOCKS * BLOCK * padded, -1, 1, 7), leaving_bias(wide, padded, -1, 1, 8);
  Buffer back_entering(wide, BLOCKS * channels * BLOCK, -1, 1, 9);
  Buffer back_leaving(wide, BLOCKS * BLOCK * back_padded, -1, 1, 10);
  Buffer result(dtype, COUNT * rows * columns * channels, 0, 1, 11);
  Buffer for_images(dtype, COUNT * ROWS * COLUMNS * FIRST, 0, 1, 12);
  std::vector<uint16_t> in_bits(COUNT * BLOCKS * ROWS * COLUMNS * RESIDUAL_WORDS);
  std::vector<uint16_t> out_bits(COUNT * BLOCKS * rows * columns * RESIDUAL_WORDS);
  ResidualPass pass{};
  pass.depthwise.kernel = {dtype, depthwise.data(), {}, BLOCK, SIDE, SIDE, stride, stride, 1, 1};
  pass.depthwise.in_rows = ROWS;
  pass.depthwise.in_columns = COLUMNS;
  pass.depthwise.out_rows = rows;
  pass.depthwise.out_columns = columns;
  pass.in = images.data();
  pass.in_channels = FIRST;
  pass.out = result.data();
  pass.out_channels = channels;
  pass.padded_channels = padded;
  pass.between = 70;
  pass.blocks = BLOCKS;
  pass.entering = entering.data();
  pass.leaving = leaving.data();
  pass.entering_bias = entering_bias.data();
  pass.depthwise_bias = depthwise_bias.data();
  pass.leaving_bias = leaving_bias.data();
  pass.in_bits = in_bits.data();
  pass.out_bits = out_bits.data();
  pass.range = {-0.25, 0.5};
  AF_ISA::inverted_residual_parts(pass, 2, 0, 2 * COUNT);
  ResidualPass back = pass;
  back.depthwise.adjoint = true;
  std::swap(back.depthwise.in_rows, back.depthwise.out_rows);
  std::swap(back.depthwise.in_columns, back.depthwise.out_columns);
  std::swap(back.in_bits, back.out_bits);
  back.in = grad.data();
  back.in_channels = channels;
  back.out = for_images.data();
  back.out_channels = FIRST;
  back.padded_channels = back_padded;
  back.entering = back_entering.data();
  back.leaving = back_leaving.data();
  back.entering_bias = back.depthwise_bias = back.leaving_bias = nullptr;
  back.gated = true;
  AF_ISA::inverted_residual_parts(back, 1, 0, COUNT);
  Hash hash;
  result.add_to(hash);
  for_images.add_to(hash);
  hash.add(in_bits.data(), in_bits.size() * sizeof(uint16_t));
  hash.add(out_bits.data(), out_bits.size() * sizeof(uint16_t));
  hash.print(std::string("inverted_residual ") + name_of(dtype) + " " + std::to_string(channels) + " " +
             std::to_string(stride));
}

// Of three images of 6 x 9 pixels, once with the weight of the convolution and once with that of its gradient.
void run_winograd_conv2d(Dtype dtype, int64_t channels, int64_t made) {
  constexpr int64_t COUNT = 3, ROWS = 6, COLUMNS = 9, TILES = COUNT * 2 * 3;
  const int64_t padded = (made + 15) / 16 * 16, slices = (made + WINOGRAD_SLICE - 1) / WINOGRAD_SLICE;
  const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  Buffer images(dtype, COUNT * ROWS * COLUMNS * channels, -1, 1, 1);
  Buffer weight(dtype, made * channels * 9, -1, 1, 2), bias(dtype, made, -1, 1, 3);
  Buffer transformed(wide, slices * WINOGRAD_PLACES * apart(channels * WINOGRAD_SLICE), 0, 1, 4);
  Buffer result(dtype, COUNT * ROWS * COLUMNS * made, 0, 1, 5);
  WinogradPass pass{};
  pass.dtype = dtype;
  pass.in = images.data();
  pass.in_channels = channels;
  pass.out = result.data();
  pass.out_channels = made;
  pass.padded_channels = padded;
  pass.in_rows = pass.out_rows = ROWS;
  pass.in_columns = pass.out_columns = COLUMNS;
  pass.above = pass.left = 1;
  pass.weight = transformed.data();
  pass.bias = bias.data();
  Hash hash;
  for (const bool side_by_side : {false, true}) {
    WinogradWeight from{dtype, weight.data(), {channels * 9, 9, 3, 1}, channels, made, padded};
    if (side_by_side)
      from = {dtype, weight.data(), {1, made, 3 * channels * made, channels * made}, channels, made, padded};
    AF_ISA::winograd_weights(from, transformed.data(), 0, slices * ((channels + 15) / 16));
    AF_ISA::winograd_tiles(pass, 0, TILES / 2, 0, padded);
    AF_ISA::winograd_tiles(pass, TILES / 2, TILES, 0, padded);
    result.add_to(hash);
  }
  // In a basic block: rectified, then behind a sum and with what goes in gated, then gated.
  Buffer residual(dtype, COUNT * ROWS * COLUMNS * made, -1, 1, 6);
  std::vector<uint16_t> bits(COUNT * ROWS * COLUMNS * words_of(made));
  std::vector<uint16_t> in_bits(COUNT * ROWS * COLUMNS * words_of(channels), 0x6b35);
  pass.out_bits = bits.data();
  for (const bool gated : {false, true}) {
    for (const bool whole : {false, true}) {
      pass.gated = gated;
      pass.in_bits = whole ? in_bits.data() : nullptr;
      pass.residual = whole ? residual.data() : nullptr;
      pass.residual_bits = whole && gated ? bits.data() : nullptr;
      AF_ISA::winograd_tiles(pass, 0, TILES, 0, padded);
      result.add_to(hash);
      hash.add(bits.data(), bits.size() * sizeof(uint16_t));
    }
  }
  hash.print(std::string("winograd_conv2d ") + name_of(dtype) + " " + std::to_string(channels) + " " +
             std::to_string(made));
}

// Three heads of two images, and their gradients.
void run_attention(Dtype dtype, int64_t tokens, int64_t width) {
  constexpr int64_t COUNT = 2, HEADS = 3;
  const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const int64_t size = COUNT * tokens * HEADS * width;
  Buffer packed(dtype, 3 * size, -2, 2, 1), grad(dtype, size, -1, 1, 2), result(dtype, size, 0, 1, 3);
  Buffer sums(wide, COUNT * HEADS * tokens * 2, 0, 1, 4), for_packed(dtype, 3 * size, 0, 1, 5);
  const AttentionPass pass{dtype,       tokens,           HEADS, width, packed.data(), result.data(), sums.data(),
                           grad.data(), for_packed.data()};
  AF_ISA::attention_heads(pass, 0, COUNT * HEADS);
  AF_ISA::attention_gradients(pass, 0, COUNT * HEADS);
  Hash hash;
  result.add_to(hash);
  for_packed.add_to(hash);
  hash.print(std::string("attention ") + name_of(dtype) + " " + std::to_string(tokens) + " " + std::to_string(width));
}

// The moments of some rows, the rows normalised by other ones, and both passes of the gradient.
void run_batch_norm(Dtype dtype, int64_t channels, Range range) {
  constexpr int64_t COUNT = 37;
  const Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  Buffer in(dtype, COUNT * channels, -1, 1, 1), grad(dtype, COUNT * channels, -1, 1, 2);
  Buffer out(dtype, COUNT * channels, 0, 1, 3), for_in(dtype, COUNT * channels, 0, 1, 4);
  Buffer scale(wide, channels, 0.5, 1.5, 5), shift(wide, channels, -1, 1, 6), mean(wide, channels, -1, 1, 7);
  Buffer slope(wide, channels, -1, 1, 8), level(wide, channels, -1, 1, 9);
  std::vector<double> moments(2 * channels), sums(2 * channels);
  const BatchNormRows rows{dtype, in.data(), channels, scale.data(), shift.data(), range};
  AF_ISA::batch_norm_moments(rows, 1, COUNT, moments.data());
  AF_ISA::batch_norm_apply(rows, 1, COUNT, out.data());
  AF_ISA::batch_norm_grad_sums(rows, grad.data(), mean.data(), 1, COUNT, sums.data());
  AF_ISA::batch_norm_grad(rows, grad.data(), mean.data(), slope.data(), level.data(), 1, COUNT, for_in.data());
  Hash hash;
  for (const double value : moments) hash.add(value);
  for (const double value : sums) hash.add(value);
  out.add_to(hash);
  for_in.add_to(hash);
  hash.print(std::string("batch_norm ") + name_of(dtype) + " " + std::to_string(channels) +
             (range.low == range.low ? " clipped" : ""));
}

constexpr double MEAN[] = {0.485, 0.456, 0.406, 0.5, 0.45}, STD[] = {0.229, 0.224, 0.225, 0.25, 0.2};
// As it is, shrunk, shrunk to a point, enlarged, and shrunk in enlarged zeros.
constexpr ResizePadPlace PLACES[] = {{0, 0, 0, 0}, {17, 1, 2, 21}, {1, 20, 0, 21}, {22, 1, 0, 24}, {9, 11, 3, 30}};

template <class Data>
Planes<Data> planes_of(Dtype dtype, Data* data, int64_t channels, int64_t side, bool interleaved) {
  return interleaved ? Planes<Data>{dtype, data, 1, side * channels, channels}
                     : Planes<Data>{dtype, data, side * side, side, 1};
}

void run_diversify(Dtype dtype, Dtype other, int64_t channels, bool interleaved, const ResizePadPlace& place) {
  constexpr int64_t SIDE = 21, COPIES = 2;
  const int64_t elements = channels * SIDE * SIDE;
  const std::string name = std::string(name_of(dtype)) + " " + name_of(other) + " " + std::to_string(channels) +
                           (interleaved ? " interleaved " : " ") + std::to_string(place.resized);
  Buffer image(dtype, elements, 0, 1, 1), pool(dtype, elements, 0, 1, 2), batch(other, elements, 0, 1, 3);
  for (const bool changed : {false, true}) {
    DiversifyCopy copy{};
    copy.size = {channels, SIDE, SIDE};
    copy.resizes = place.resized != 0;
    copy.streams = changed;
    copy.image = planes_of<const void>(dtype, image.data(), channels, SIDE, false);
    if (changed) copy.pool = planes_of<const void>(dtype, pool.data(), channels, SIDE, interleaved);
    copy.weight = 0.2;
    copy.scale = changed ? 0.7 : 1;
    copy.noisy = changed;
    copy.noise = philox_stream(5, 3, 1, 2, 4);
    copy.noise_low = -0.1f;
    copy.noise_width = 0.2f;
    copy.place = place;
    copy.mean = MEAN;
    copy.std = STD;
    copy.out = planes_of<void>(other, batch.data(), channels, SIDE, interleaved);
    AF_ISA::diversify_rows(copy, 0, SIDE);
    Hash hash;
    batch.add_to(hash);
    hash.print("diversify " + name + (changed ? " changed" : ""));
  }

  Buffer grad(other, COPIES * elements, -1, 1, 4), sum(dtype, elements, 0, 1, 5);
  const double scale[] = {0.7, 1.5};
  const ResizePadPlace places[] = {place, PLACES[1]};
  DiversifyAdjoint adjoint{};
  adjoint.size = {channels, SIDE, SIDE};
  adjoint.resizes = true;
  adjoint.streams = interleaved;
  adjoint.copies = COPIES;
  adjoint.grad = planes_of<const void>(other, grad.data(), channels, SIDE, interleaved);
  adjoint.grad_stride = elements;
  adjoint.scale = scale;
  adjoint.place = places;
  adjoint.stride = 1;
  adjoint.std = STD;
  adjoint.out = planes_of<void>(dtype, sum.data(), channels, SIDE, false);
  AF_ISA::diversify_adjoint_rows(adjoint, 0, SIDE);
  Hash hash;
  sum.add_to(hash);
  hash.print("diversify_adjoint " + name);
}

void run_philox_uniform() {
  const PhiloxStream stream = philox_stream(0xa4093822299f31d0u, 0xfffffffeu, 7, 65537, 3);
  for (const int64_t count : {1, 3, 128, 1001}) {
    for (const int64_t first : {int64_t{0}, int64_t{13}, (int64_t{1} << 34) - 2048}) {
      std::vector<float> draws(static_cast<size_t>(count));
      AF_ISA::philox_uniform(stream, first, count, -0.3f, 0.7f, draws.data());
      Hash hash;
      hash.add(draws.data(), draws.size() * sizeof(float));
      hash.print("philox_uniform " + std::to_string(first) + " " + std::to_string(count));
    }
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : DTYPES) {
    for (const Shape& shape : SHAPES) {
      for (const bool moving : {false, true}) run_sign_step(dtype, shape, moving);
    }
    for (const int64_t classes : {1, 10, 1000, 21841}) {
      for (const int64_t stride : {1, 2}) run_kl_div_with_logits(dtype, classes, stride);
    }
    for (const int64_t width : {1, 5, 31, 100}) {
      for (const int64_t step : {1, 3}) run_smooth(dtype, 9, width, step, 1);
      run_smooth(dtype, 9, width, 1, 2);
    }
    for (const int64_t tokens : {1, 17, 70}) {
      for (const int64_t width : {1, 16, 20}) run_attention(dtype, tokens, width);
    }
    for (const int64_t channels : {1, 16, 33}) {
      for (const int64_t made : {1, 32, 70}) run_winograd_conv2d(dtype, channels, made);
    }
    for (const int64_t channels : {1, 15, 33, 130}) {
      for (const int64_t stride : {1, 2, 4}) run_depthwise_conv2d(dtype, channels, stride);
      for (const int64_t stride : {1, 2, 4}) run_inverted_residual(dtype, channels, stride);
      for (const Range range : {EVERYTHING, Range{-0.25, 0.5}}) run_batch_norm(dtype, channels, range);
    }
    for (const Dtype other : DTYPES) {
      for (const int64_t channels : {1, 3, 5}) {
        for (const ResizePadPlace& place : PLACES) {
          for (const bool interleaved : {false, true}) run_diversify(dtype, other, channels, interleaved, place);
        }
      }
    }
  }
  run_philox_uniform();
}
