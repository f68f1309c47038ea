#include "cpu/kl_div_with_logits.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "checks/kl_div_with_logits.h"
#include "common.h"

namespace alignfast {
namespace {

// The sum of the losses is made of at most this many, whatever the number of threads, so that their order is always
// the same.
constexpr int64_t MAX_GROUPS = 1024;
// What a row costs whatever its length, in classes.
constexpr int64_t ROW_COST = 256;

// A batch of logits; the first stride is that of the witnesses.
struct Logits {
  Dtype dtype;
  const char* data;
  int64_t bytes;
  int64_t strides[3];

  Logits(const Tensor& tensor, Dtype dtype)
      : dtype(dtype),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        bytes(static_cast<int64_t>(tensor.element_size())),
        strides{tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2), tensor.stride(-1)} {}

  LogitsRow row(int64_t witness, int64_t sample) const {
    return {dtype, data + (witness * strides[0] + sample * strides[1]) * bytes, strides[2]};
  }
};

struct Batch {
  Logits student, teacher;
  int64_t witnesses, classes;
  double temperature;
  Direction direction;
  Combine combine;
  bool float64;
  double (*kernel)(const KlSample&, double, bool, void*);

  double divergence(int64_t sample, int64_t witness, double weight, bool add, void* gradient) const {
    return kernel({student.row(0, sample), teacher.row(witness, sample), classes, temperature, direction, float64},
                  weight, add, gradient);
  }

  double mean(int64_t sample, double weight, void* gradient) const {
    double total = 0;
    for (int64_t w = 0; w < witnesses; ++w) {
      total += divergence(sample, w, weight / static_cast<double>(witnesses), w > 0, gradient);
    }
    return total / static_cast<double>(witnesses);
  }

  // The largest or smallest divergence. Those that are equal to it share the gradient evenly.
  double extreme(int64_t sample, double weight, void* gradient) const {
    const double sign = combine == Combine::max ? 1 : -1;
    double best = 0;
    int64_t first = 0, ties = 0;
    for (int64_t w = 0; w < witnesses; ++w) {
      const double value = divergence(sample, w, 0, false, nullptr);
      // NaN wins over all numbers, as it does in torch.amax.
      if (w == 0 || sign * value > sign * best || (std::isnan(value) && !std::isnan(best))) {
        best = value;
        first = w;
        ties = 1;
      } else if (value == best) {
        ++ties;
      }
    }
    if (gradient == nullptr) return best;
    divergence(sample, first, weight / static_cast<double>(ties), false, gradient);
    for (int64_t w = first + 1, left = ties - 1; left > 0; ++w) {
      if (divergence(sample, w, 0, false, nullptr) != best) continue;
      divergence(sample, w, weight / static_cast<double>(ties), true, gradient);
      --left;
    }
    return best;
  }

  double loss(int64_t sample, double weight, void* gradient) const {
    if (classes == 0) return 0;
    return combine == Combine::mean || witnesses == 1 ? mean(sample, weight, gradient)
                                                      : extreme(sample, weight, gradient);
  }
};

void store(const Tensor& tensor, int64_t i, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    tensor.mutable_data_ptr<double>()[i] = value;
  } else {
    tensor.mutable_data_ptr<float>()[i] = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor> kl_div_with_logits(Tensor student, Tensor teacher, double temperature, std::string direction,
                                              std::string reduction, std::string combine, bool with_gradient) {
  check_kl_div_with_logits(student, teacher, temperature);
  const Logits student_logits(student, floating_dtype("student", student.scalar_type()));
  const Logits teacher_logits(teacher, floating_dtype("teacher", teacher.scalar_type()));
  const bool float64 = student_logits.dtype == Dtype::float64 || teacher_logits.dtype == Dtype::float64;
  const Reduction reduced = chosen("reduction", reduction, REDUCTIONS);
  const Batch batch{student_logits,
                    teacher_logits,
                    teacher.dim() == 3 ? teacher.size(0) : 1,
                    student.size(1),
                    temperature,
                    chosen("direction", direction, DIRECTIONS),
                    chosen("combine", combine, COMBINES),
                    float64,
                    AF_KERNEL(kl_div_with_logits)};

  const int64_t samples = student.size(0);
  const ScalarType type = float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor loss =
      torch::stable::empty(reduced == Reduction::none ? std::vector<int64_t>{samples} : std::vector<int64_t>{}, type);
  const Tensor gradient = torch::stable::empty(
      with_gradient ? std::vector<int64_t>{samples, batch.classes} : std::vector<int64_t>{0}, type);
  char* gradients = with_gradient ? static_cast<char*>(gradient.mutable_data_ptr()) : nullptr;
  const int64_t row_bytes = batch.classes * static_cast<int64_t>(gradient.element_size());
  const double weight = reduced == Reduction::batchmean ? 1 / static_cast<double>(std::max<int64_t>(samples, 1)) : 1;

  std::array<double, MAX_GROUPS> sums;
  const int64_t size = (samples + MAX_GROUPS - 1) / MAX_GROUPS;
  const int64_t groups = samples > 0 ? (samples + size - 1) / size : 0;
  torch::stable::parallel_for(
      0, groups, grain_of(size * batch.witnesses * (batch.classes + ROW_COST)), [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
          sums[group] = 0;
          for (int64_t n = group * size; n < std::min(samples, (group + 1) * size); ++n) {
            const double value = batch.loss(n, weight, with_gradient ? gradients + n * row_bytes : nullptr);
            if (reduced == Reduction::none) store(loss, n, value);
            sums[group] += value;
          }
        }
      });
  if (reduced != Reduction::none) store(loss, 0, weight * std::accumulate(sums.begin(), sums.begin() + groups, 0.0));
  return {loss, gradient};
}

Tensor kl_div_with_logits_backward(Tensor grad, Tensor gradient, Tensor student) {
  const Dtype dtype = check_kl_div_with_logits_backward(grad, gradient, student);
  const Tensor result = torch::stable::empty({student.size(0), student.size(1)}, student.scalar_type());
  if (result.numel() == 0) return result;
  const bool float64 = gradient.scalar_type() == ScalarType::Double;
  const auto kernel = AF_KERNEL(kl_div_with_logits_backward);
  const char* from = static_cast<const char*>(gradient.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const int64_t classes = student.size(1), stride = grad.dim() == 0 ? 0 : grad.stride(0);
  const int64_t from_bytes = classes * static_cast<int64_t>(gradient.element_size());
  const int64_t to_bytes = classes * static_cast<int64_t>(result.element_size());
  torch::stable::parallel_for(0, student.size(0), grain_of(classes), [&](int64_t begin, int64_t end) {
    // Rows that share a factor are one long row.
    const int64_t rows = stride == 0 ? end - begin : 1;
    for (int64_t n = begin; n < end; n += rows) {
      const double factor = float64 ? grad.const_data_ptr<double>()[n * stride]
                                    : static_cast<double>(grad.const_data_ptr<float>()[n * stride]);
      kernel(from + n * from_bytes, float64, factor, dtype, rows * classes, to + n * to_bytes);
    }
  });
  return result;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("kl_div_with_logits", TORCH_BOX(&alignfast::kl_div_with_logits));
  m.impl("kl_div_with_logits_backward", TORCH_BOX(&alignfast::kl_div_with_logits_backward));
}
