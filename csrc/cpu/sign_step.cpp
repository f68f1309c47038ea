#include "cpu/sign_step.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "checks/sign_step.h"
#include "common.h"
#include "layout.h"

namespace alignfast {
namespace {

constexpr int64_t CHUNK = 1024;
// An image's sums are made of at most this many, whatever the number of threads, so that their order is always the
// same.
constexpr int64_t MAX_GROUPS = 1024;

// The image of SignStepImage cut into groups of whole chunks.
struct Groups {
  int64_t elements, size, count;

  explicit Groups(int64_t elements) : elements(elements) {
    const int64_t chunks = (elements + CHUNK - 1) / CHUNK;
    size = (chunks + MAX_GROUPS - 1) / MAX_GROUPS * CHUNK;
    count = (elements + size - 1) / size;
  }

  // Calls visit(group, begin, end) for every group, on threads of their own if this thread is not already one of many.
  template <class Visit>
  void each(const Visit& visit) const {
    torch::stable::parallel_for(0, count, grain_of(size), [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) {
        visit(group, group * size, std::min(elements, (group + 1) * size));
      }
    });
  }

  template <class Partial, class Combine>
  double reduce(const Partial& partial, Combine combine) const {
    std::array<double, MAX_GROUPS> partials;
    each([&](int64_t group, int64_t begin, int64_t end) { partials[group] = partial(begin, end); });
    return std::accumulate(partials.begin(), partials.begin() + count, 0.0, combine);
  }

  template <class Partial>
  double sum(const Partial& partial) const {
    return reduce(partial, [](double a, double b) { return a + b; });
  }

  template <class Partial>
  double max(const Partial& partial) const {
    return reduce(partial, [](double a, double b) { return std::max(a, b); });
  }
};

double l1_mean(const SignStepImage& image, const Groups& groups) {
  if (image.momentum == nullptr) return 0;
  const auto l1 = AF_KERNEL(sign_step_l1);
  return groups.sum([&](int64_t begin, int64_t end) { return l1(image, begin, end); }) /
         static_cast<double>(groups.elements);
}

void linf(const SignStepImage& image, const SignStepConfig& config, const Groups& groups) {
  const auto step = AF_KERNEL(sign_step_linf);
  const double mean = l1_mean(image, groups);
  groups.each([&](int64_t, int64_t begin, int64_t end) { step(image, config, mean, begin, end); });
}

void l2(const SignStepImage& image, const SignStepConfig& config, const Groups& groups) {
  const auto direction = AF_KERNEL(sign_step_direction);
  const auto squares = AF_KERNEL(sign_step_length);
  const auto move = AF_KERNEL(sign_step_l2_move);
  const auto project = AF_KERNEL(sign_step_l2_project);
  const double mean = l1_mean(image, groups);
  const double largest =
      groups.max([&](int64_t begin, int64_t end) { return direction(image, config, mean, begin, end); });
  // At least 1, as the largest element is 1, unless all are zero.
  const double length = std::max(
      1.0, std::sqrt(groups.sum([&](int64_t begin, int64_t end) { return squares(image, largest, begin, end); })));
  const double distance = std::sqrt(
      groups.sum([&](int64_t begin, int64_t end) { return move(image, config, largest, length, begin, end); }));
  const double shrink = distance > config.eps ? config.eps / distance : 1.0;
  groups.each([&](int64_t, int64_t begin, int64_t end) { project(image, config, shrink, begin, end); });
}

void sign_step(Tensor adv, Tensor images, Tensor grad, std::optional<Tensor> momentum, double alpha, double eps,
               double decay, double low, double high, std::string norm) {
  const Dtype dtype = check_sign_step(adv, images, grad, momentum, alpha, eps, decay, low, high, norm);
  if (images.numel() == 0) return;

  const auto order = memory_order(adv);
  const SignStepConfig config{alpha, eps, decay, low, high};
  const SignStepImage first{dtype,
                            adv.mutable_data_ptr(),
                            images.const_data_ptr(),
                            grad.const_data_ptr(),
                            momentum ? momentum->mutable_data_ptr() : nullptr,
                            layout_of(adv, order),
                            layout_of(images, order),
                            layout_of(grad, order),
                            layout_of(momentum ? *momentum : adv, order)};
  const int64_t bytes = static_cast<int64_t>(images.element_size());
  const auto at = [bytes](auto* data, const Tensor& tensor, int64_t n) {
    return static_cast<decltype(data)>(
        const_cast<char*>(static_cast<const char*>(data) + n * tensor.stride(0) * bytes));
  };
  const int64_t count = images.size(0);
  const Groups groups(images.numel() / count);
  // An image to a thread keeps it in that thread's cache between the passes; few images are cut up instead.
  const bool many = count >= 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, count, many ? grain_of(groups.elements) : count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      SignStepImage image = first;
      image.adv = at(first.adv, adv, n);
      image.image = at(first.image, images, n);
      image.grad = at(first.grad, grad, n);
      if (momentum) image.momentum = at(first.momentum, *momentum, n);
      (norm == "linf" ? linf : l2)(image, config, groups);
    }
  });
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) { m.impl("sign_step", TORCH_BOX(&alignfast::sign_step)); }
