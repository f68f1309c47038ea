// An inverted residual in one pass: a pointwise convolution, a depthwise one and another pointwise one, with clips
// between them. What lies between them is computed row by row, a block of channels at a time, and never stored.

#pragma once

#include "cpu/depthwise_conv2d.h"
#include "cpu/isa.h"

namespace alignfast {

// Channels between the pointwise convolutions that are worked on at a time, in a lane each.
constexpr int64_t RESIDUAL_BLOCK = 48;
constexpr int64_t RESIDUAL_WORDS = RESIDUAL_BLOCK / 16;

// The three convolutions, or their adjoint, which takes the same way back. Images are dense [N, rows, columns, C] of
// the dtype in `depthwise`, whose channels are those of all blocks; everything else is in its wide type.
struct ResidualPass {
  // Between the pointwise ones; of its pointers only that to the weights, [blocks, kernel_rows, kernel_columns,
  // RESIDUAL_BLOCK], is looked at, and of its ranges none.
  DepthwisePass depthwise;
  const void* in;
  int64_t in_channels;
  void* out;
  int64_t out_channels, padded_channels;
  // Channels between the pointwise convolutions, and the blocks that they fill.
  int64_t between, blocks;
  // [blocks, in_channels, RESIDUAL_BLOCK] and [blocks, RESIDUAL_BLOCK, padded_channels].
  const void* entering;
  const void* leaving;
  // [blocks * RESIDUAL_BLOCK] twice and [padded_channels]; null for none, then all are.
  const void* entering_bias;
  const void* depthwise_bias;
  const void* leaving_bias;
  // Bits of where values lie inside of the range, before they are clipped to it: [N, blocks, rows, columns,
  // RESIDUAL_WORDS], of what goes into the depthwise convolution and of what comes out. They are written, or where
  // `gated` they say which values are kept and nothing is clipped.
  uint16_t* in_bits;
  uint16_t* out_bits;
  bool gated;
  Range range;
};

// Parts begin .. end of all the images, each of which is cut into `parts` along its rows.
AF_DECLARE_KERNEL(void, inverted_residual_parts, const ResidualPass& pass, int64_t parts, int64_t begin, int64_t end)

}  // namespace alignfast
