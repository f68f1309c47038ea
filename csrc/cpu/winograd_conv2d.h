// Convolutions of 3 x 3 by Winograd's minimal filtering: every 4 x 4 pixels of the result come from 36 products of
// transformed pixels and weights, one for each place, in place of 144.

#pragma once

#include "cpu/isa.h"
#include "math/scalar.h"

namespace alignfast {

// Rows and columns of the result that a tile makes, of the images that it reads, and of transformed tiles.
constexpr int64_t WINOGRAD_OUT = 4;
constexpr int64_t WINOGRAD_IN = 6;
constexpr int64_t WINOGRAD_PLACES = WINOGRAD_IN * WINOGRAD_IN;
// Channels of the result that are summed for all tiles of a chunk before the next ones are.
constexpr int64_t WINOGRAD_SLICE = 64;

// Parts of a size that hold so many: tiles of a side, slices of channels.
constexpr int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Words of 16 bits for the channels of a pixel, a bit each.
constexpr int64_t words_of(int64_t channels) { return parts_of(channels, 16); }

// How far apart the values of two places lie, of which each has `count`: a line of the cache more, since lines at
// powers of two push each other out of it.
constexpr int64_t apart(int64_t count) { return count + 16; }

// Values of the slice that begins with a channel, which is of `padded_channels`; and where the slice lies.
constexpr int64_t slice_width(int64_t first, int64_t padded_channels) {
  return padded_channels - first < WINOGRAD_SLICE ? padded_channels - first : WINOGRAD_SLICE;
}
constexpr int64_t slice_offset(int64_t first, int64_t in_channels) {
  return first / WINOGRAD_SLICE * WINOGRAD_PLACES * apart(in_channels * WINOGRAD_SLICE);
}

// weight[k * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]], of k of the result and c of the images.
struct WinogradWeight {
  Dtype dtype;
  const void* values;
  int64_t strides[4];
  int64_t in_channels, out_channels, padded_channels;
};

// Dense [N, rows, columns, channels].
struct WinogradPass {
  Dtype dtype;
  const void* in;
  int64_t in_rows, in_columns, in_channels;
  void* out;
  int64_t out_rows, out_columns, out_channels, padded_channels;
  int64_t above, left;
  // In the wide type: slices of WINOGRAD_PLACES times [in_channels, up to WINOGRAD_SLICE of padded_channels], `apart`.
  const void* weight;
  // [out_channels] of the dtype, or null.
  const void* bias;
  // Bits that say which values count, as [N, rows, columns, words_of(channels)], the others are zero: of what goes in,
  // or null where all do.
  const uint16_t* in_bits;
  // Added to the result: of its shape, and which of it counts; or null.
  const void* residual;
  const uint16_t* residual_bits;
  // Of the result: null, or written, where a rectifier makes zero of what is not positive; or read, where `gated`.
  uint16_t* out_bits;
  bool gated;
};

// Blocks begin .. end of a slice of the result's channels by 16 of the images.
AF_DECLARE_KERNEL(void, winograd_weights, const WinogradWeight& weight, void* transformed, int64_t begin, int64_t end)
// Tiles begin .. end of all images, and channels first .. last of the result, which slices begin and end with.
AF_DECLARE_KERNEL(void, winograd_tiles, const WinogradPass& pass, int64_t begin, int64_t end, int64_t first,
                  int64_t last)

}  // namespace alignfast
