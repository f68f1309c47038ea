// Which pixels that go into a depthwise convolution, or into its adjoint, a row that comes out is summed from. For
// files compiled per instruction set: everything here has internal linkage.

#pragma once

#include "cpu/buffer.h"
#include "cpu/depthwise_conv2d.h"

namespace alignfast {
namespace {

// Pixels of a row of the result that are `step` apart, from the first on: the one numbered j is a sum over the taps of
// weights[tap] times the pixel in_step * j + offset of a row that goes in.
struct Comb {
  int64_t first, step, count, in_step;
  int64_t taps;
  int64_t weight[DEPTHWISE_LARGEST], offset[DEPTHWISE_LARGEST];
};

// Those that make up a row of the result.
class Combs {
 public:
  explicit Combs(const DepthwisePass& pass)
      : count_(pass.adjoint ? smaller(pass.kernel.stride_columns, pass.out_columns) : 1), combs_(count_) {
    const DepthwiseKernel& kernel = pass.kernel;
    const int64_t stride = kernel.stride_columns;
    for (int64_t first = 0; first < count_; ++first) {
      Comb& comb = combs_[first];
      comb = pass.adjoint ? Comb{first, stride, (pass.out_columns - first + stride - 1) / stride, 1, 0, {}, {}}
                          : Comb{0, 1, pass.out_columns, stride, 0, {}, {}};
      for (int64_t k = 0; k < kernel.columns; ++k) {
        const int64_t distance = first + kernel.left - k;
        if (pass.adjoint && distance % stride != 0) continue;
        comb.weight[comb.taps] = k;
        comb.offset[comb.taps++] = pass.adjoint ? distance / stride : k - kernel.left;
      }
    }
  }

  const Comb* begin() const { return combs_; }
  const Comb* end() const { return combs_ + count_; }

  // Pixels that taps reach before a row.
  int64_t before() const {
    int64_t reach = 0;
    for (const Comb& comb : *this) {
      for (int64_t i = 0; i < comb.taps; ++i) reach = larger(reach, -comb.offset[i]);
    }
    return reach;
  }

  // And behind one of so many columns.
  int64_t behind(int64_t columns) const {
    int64_t reach = 0;
    for (const Comb& comb : *this) {
      const int64_t last = comb.in_step * (comb.count - 1);
      for (int64_t i = 0; i < comb.taps; ++i) reach = larger(reach, last + comb.offset[i] + 1 - columns);
    }
    return reach;
  }

 private:
  int64_t count_;
  Buffer<Comb> combs_;
};

// Calls visit(row that goes in, row of the kernel) for those that row y of the result is summed from.
template <class Visit>
void each_source(const DepthwisePass& pass, int64_t y, Visit visit) {
  const DepthwiseKernel& kernel = pass.kernel;
  for (int64_t k = 0; k < kernel.rows; ++k) {
    const int64_t distance = y + kernel.top - k;
    if (pass.adjoint && distance % kernel.stride_rows != 0) continue;
    const int64_t row = pass.adjoint ? distance / kernel.stride_rows : y * kernel.stride_rows + k - kernel.top;
    if (0 <= row && row < pass.in_rows) visit(row, k);
  }
}

}  // namespace
}  // namespace alignfast
