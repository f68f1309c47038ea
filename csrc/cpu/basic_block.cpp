// A basic block, relu(images + second(relu(first(images)))), of 3 x 3 convolutions by minimal filtering. A thread takes
// a few images through both, so that what lies between them stays in its cache.

#include <algorithm>
#include <tuple>

#include "checks/dense.h"
#include "checks/depthwise.h"
#include "checks/interleaved.h"
#include "common.h"
#include "cpu/buffer.h"
#include "cpu/winograd_conv2d.h"
#include "cpu/winograd_weight.h"

namespace alignfast {
namespace {

// A few images have as many tiles as this, for which far weights are read once.
constexpr int64_t FEWEST_TILES = 48;

// Both convolutions, with what is the same for them; images of the block's channels go in and come out.
struct Block {
  Dtype dtype;
  int64_t count, rows, columns, channels, middle;

  // Bytes of an image, and words of its bits.
  int64_t size(int64_t of_channels) const { return rows * columns * of_channels * size_of(dtype); }
  int64_t words(int64_t of_channels) const { return rows * columns * words_of(of_channels); }
  Sizes bits(int64_t of_channels) const { return {count, rows, columns, words_of(of_channels)}; }
};

Block block_of(const Tensor& images, const Tensor& first, const Tensor& second) {
  const Dtype dtype = check_interleaved_images("images", images);
  const int64_t channels = images.size(1);
  check_weight("first", first, images, {-1, channels, 3, 3});
  check_weight("second", second, images, {channels, first.size(0), 3, 3});
  return {dtype, images.size(0), images.size(2), images.size(3), channels, first.size(0)};
}

WinogradReady ready_of(const Block& block, const Tensor& weight, const Tensor& images, bool adjoint) {
  WinogradReady ready = alignfast::ready_of(weight, images, block.dtype, adjoint);
  ready.pass.in_rows = ready.pass.out_rows = block.rows;
  ready.pass.in_columns = ready.pass.out_columns = block.columns;
  ready.pass.above = ready.pass.left = 1;
  return ready;
}

// From an image on, of what of the pass has images.
WinogradPass from_image(const Block& block, WinogradPass pass, int64_t image) {
  const int64_t in = image * block.size(pass.in_channels), out = image * block.size(pass.out_channels);
  const int64_t in_words = image * block.words(pass.in_channels), out_words = image * block.words(pass.out_channels);
  if (pass.in != nullptr) pass.in = static_cast<const char*>(pass.in) + in;
  if (pass.in_bits != nullptr) pass.in_bits += in_words;
  if (pass.residual != nullptr) pass.residual = static_cast<const char*>(pass.residual) + out;
  if (pass.residual_bits != nullptr) pass.residual_bits += out_words;
  if (pass.out != nullptr) pass.out = static_cast<char*>(pass.out) + out;
  if (pass.out_bits != nullptr) pass.out_bits += out_words;
  return pass;
}

// What the first pass makes of an image goes into the second one and nowhere else.
void run(const Block& block, const WinogradPass& first, const WinogradPass& second) {
  const int64_t tiles = parts_of(block.rows, WINOGRAD_OUT) * parts_of(block.columns, WINOGRAD_OUT);
  const int64_t threads = torch::stable::get_num_threads(), most = parts_of(FEWEST_TILES, tiles);
  const int64_t parts = std::min(block.count, parts_of(block.count, most * threads) * threads);
  const auto kernel = AF_KERNEL(winograd_tiles);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> between(parts_of(block.count, parts) * block.size(block.middle));
    for (; begin < end; ++begin) {
      const int64_t image = block.count * begin / parts;
      const int64_t some = (block.count * (begin + 1) / parts - image) * tiles;
      WinogradPass one = from_image(block, first, image), other = from_image(block, second, image);
      other.in = one.out = between;
      kernel(one, 0, some, 0, one.padded_channels);
      kernel(other, 0, some, 0, other.padded_channels);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> basic_block(Tensor images, Tensor first, std::optional<Tensor> first_bias,
                                               Tensor second, std::optional<Tensor> second_bias) {
  const Block block = block_of(images, first, second);
  const void* one_bias = bias_in("first_bias", first_bias, images, block.middle);
  const void* other_bias = bias_in("second_bias", second_bias, images, block.channels);
  const Tensor out = interleaved({block.count, block.channels, block.rows, block.columns}, images);
  const Tensor first_bits = dense(block.bits(block.middle), ScalarType::Short, images);
  const Tensor second_bits = dense(block.bits(block.channels), ScalarType::Short, images);
  if (out.numel() == 0) return {out, first_bits, second_bits};
  WinogradReady one_ready = ready_of(block, first, images, false), other_ready = ready_of(block, second, images, false);
  WinogradPass &one = one_ready.pass, &other = other_ready.pass;
  one.in = other.residual = images.const_data_ptr();
  one.bias = one_bias;
  one.out_bits = static_cast<uint16_t*>(first_bits.mutable_data_ptr());
  other.bias = other_bias;
  other.out = out.mutable_data_ptr();
  other.out_bits = static_cast<uint16_t*>(second_bits.mutable_data_ptr());
  run(block, one, other);
  return {out, first_bits, second_bits};
}

Tensor basic_block_linear(Tensor images, Tensor first, Tensor second, Tensor first_bits, Tensor second_bits,
                          bool adjoint) {
  const Block block = block_of(images, first, second);
  uint16_t* inside = bits_in("first_bits", first_bits, images, block.bits(block.middle));
  uint16_t* outside = bits_in("second_bits", second_bits, images, block.bits(block.channels));
  const Tensor out = interleaved({block.count, block.channels, block.rows, block.columns}, images);
  if (out.numel() == 0) return out;
  WinogradReady one_ready = ready_of(block, adjoint ? second : first, images, adjoint);
  WinogradReady other_ready = ready_of(block, adjoint ? first : second, images, adjoint);
  WinogradPass &one = one_ready.pass, &other = other_ready.pass;
  one.gated = other.gated = true;
  one.in = other.residual = images.const_data_ptr();
  one.out_bits = inside;
  other.out = out.mutable_data_ptr();
  if (adjoint) {
    one.in_bits = other.residual_bits = outside;
  } else {
    other.out_bits = outside;
  }
  run(block, one, other);
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("basic_block", TORCH_BOX(&alignfast::basic_block));
  m.impl("basic_block_linear", TORCH_BOX(&alignfast::basic_block_linear));
}
