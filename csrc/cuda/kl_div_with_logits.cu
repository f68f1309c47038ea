#include <algorithm>
#include <tuple>

#include "checks/kl_div_with_logits.h"
#include "cuda/kl_div_with_logits.cuh"
#include "cuda/launch.h"
#include "with_type.h"

namespace alignfast {
namespace {

// Blocks for each multiprocessor, which then go on to further samples.
constexpr int64_t KL_BLOCKS = 16;

// For rows whose logits stay in registers, which are those of up to about a thousand classes, and for others.
template <class T>
constexpr int KEPT_THREADS = sizeof(T) == 2 ? 128 : 256;
constexpr int STREAM_THREADS = 512;
// Classes are counted in 32 bits, up to a stride of the threads beyond the last.
constexpr int64_t MAX_CLASSES = int64_t{1} << 30;

// A row that starts in the middle of a pack has one more of them than its classes fill.
template <class T>
constexpr int64_t MAX_KEPT_CLASSES = int64_t{KEPT_THREADS<T> - 1} * 16 / static_cast<int64_t>(sizeof(T));

template <class T>
LogitsBatch<T> logits_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2)};
}

template <class T, bool JSD>
void divergences(const Launcher& launch, const KlBatch<T>& batch) {
  const int64_t blocks = std::min(batch.samples, KL_BLOCKS * launch.multiprocessors());
  // Doubles would need more registers than there are.
  if constexpr (sizeof(T) < sizeof(double)) {
    if (batch.classes <= MAX_KEPT_CLASSES<T>) {
      return launch("kl_div_with_logits", kl_div_with_logits<T, JSD, KEPT_THREADS<T>, true>, blocks, KEPT_THREADS<T>,
                    batch);
    }
  }
  launch("kl_div_with_logits", kl_div_with_logits<T, JSD, STREAM_THREADS, false>, blocks, STREAM_THREADS, batch);
}

template <class T>
void loss_and_gradient(const KlBatch<T>& batch, bool reduced, const Tensor& loss, const Tensor& student) {
  using V = Wide<T>;
  const Launcher launch(student);
  const auto find = batch.direction == Direction::jsd ? divergences<T, true> : divergences<T, false>;
  if (batch.samples > 0) {
    if (batch.combine != Combine::mean) {
      KlBatch<T> first = batch;
      first.gradient = nullptr;
      find(launch, first);
    }
    if (batch.combine == Combine::mean || batch.gradient != nullptr) find(launch, batch);
  }
  V* result = static_cast<V*>(loss.mutable_data_ptr());
  if (reduced || batch.samples > 0) {
    launch("kl_div_with_logits_loss", reduced ? kl_div_with_logits_loss<V, true> : kl_div_with_logits_loss<V, false>,
           reduced ? 1 : in_groups_of(KL_LOSS_THREADS, batch.samples), KL_LOSS_THREADS, batch.divergences,
           batch.samples, batch.witnesses, batch.combine, batch.weight, result);
  }
}

// Rows whose neighbouring classes are side by side, of the given dtype; a copy where they are not.
Tensor rows_of(const Tensor& logits, ScalarType type) {
  const Tensor typed = logits.scalar_type() == type ? logits : torch::stable::to(logits, type);
  const bool in_rows = typed.size(-1) <= 1 || typed.stride(-1) == 1;
  return in_rows ? typed : torch::stable::contiguous(typed);
}

std::tuple<Tensor, Tensor> kl_div_with_logits_forward(Tensor student, Tensor teacher, double temperature,
                                                      std::string direction, std::string reduction, std::string combine,
                                                      bool with_gradient) {
  check_kl_div_with_logits(student, teacher, temperature);
  const Dtype student_dtype = floating_dtype("student", student.scalar_type());
  const Dtype teacher_dtype = floating_dtype("teacher", teacher.scalar_type());
  const Direction towards = chosen("direction", direction, DIRECTIONS);
  const Reduction reduced = chosen("reduction", reduction, REDUCTIONS);
  const Combine combined = chosen("combine", combine, COMBINES);
  const int64_t samples = student.size(0), classes = student.size(1);
  const int64_t witnesses = teacher.dim() == 3 ? teacher.size(0) : 1;

  const bool float64 = student_dtype == Dtype::float64 || teacher_dtype == Dtype::float64;
  const ScalarType wide = float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor loss =
      empty_on(student, reduced == Reduction::none ? std::vector<int64_t>{samples} : std::vector<int64_t>{}, wide);
  const Tensor gradient =
      empty_on(student, with_gradient ? std::vector<int64_t>{samples, classes} : std::vector<int64_t>{0}, wide);
  const Tensor divergences = empty_on(student, {witnesses, samples}, ScalarType::Double);
  AF_CHECK(classes <= MAX_CLASSES, "student: got ", classes, " classes; allowed is up to ", MAX_CLASSES);
  if (classes == 0) {
    torch::stable::fill_(loss, 0);
    return {loss, gradient};
  }

  // Of two dtypes, what both are computed in.
  const ScalarType common = student_dtype == teacher_dtype ? student.scalar_type() : wide;
  const Tensor student_rows = rows_of(student, common), teacher_rows = rows_of(teacher, common);
  with_type(floating_dtype("student", common), [&](auto type) {
    using T = decltype(type);
    KlBatch<T> batch{};
    batch.student = logits_of<T>(student_rows);
    batch.teacher = logits_of<T>(teacher_rows);
    batch.samples = samples;
    batch.witnesses = witnesses;
    batch.classes = static_cast<int>(classes);
    batch.temperature = temperature;
    batch.direction = towards;
    batch.combine = witnesses == 1 ? Combine::mean : combined;
    batch.weight = reduced == Reduction::batchmean ? 1 / static_cast<double>(std::max<int64_t>(samples, 1)) : 1;
    batch.divergences = divergences.mutable_data_ptr<double>();
    batch.gradient = with_gradient ? static_cast<Wide<T>*>(gradient.mutable_data_ptr()) : nullptr;
    batch.doublings = static_cast<Wide<T>>(LOG2_E / temperature);
    batch.inverse_temperature = static_cast<Wide<T>>(1 / temperature);
    loss_and_gradient(batch, reduced != Reduction::none, loss, student);
  });
  return {loss, gradient};
}

template <class V>
void multiply(const Tensor& grad, const Tensor& gradient, Dtype dtype, const Tensor& result) {
  const KlBackward<V> backward{static_cast<const V*>(gradient.const_data_ptr()),
                               static_cast<const V*>(grad.const_data_ptr()),
                               grad.dim() == 0 ? 0 : grad.stride(0),
                               result.size(1),
                               result.numel(),
                               dtype,
                               result.mutable_data_ptr()};
  const Launcher launch(result);
  launch("kl_div_with_logits_backward", kl_div_with_logits_backward<V>,
         in_groups_of(KL_BACKWARD_THREADS * PACK<V>, result.numel()), KL_BACKWARD_THREADS, backward);
}

Tensor kl_div_with_logits_gradient(Tensor grad, Tensor gradient, Tensor student) {
  const Dtype dtype = check_kl_div_with_logits_backward(grad, gradient, student);
  const Tensor result = empty_on(student, {student.size(0), student.size(1)}, student.scalar_type());
  if (result.numel() == 0) return result;
  (gradient.scalar_type() == ScalarType::Double ? multiply<double> : multiply<float>)(grad, gradient, dtype, result);
  return result;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, AF_GPU_KEY, m) {
  m.impl("kl_div_with_logits", TORCH_BOX(&alignfast::kl_div_with_logits_forward));
  m.impl("kl_div_with_logits_backward", TORCH_BOX(&alignfast::kl_div_with_logits_gradient));
}
