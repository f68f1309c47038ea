// Divergences of a batch: a block finds those of one sample after another, from the logits to the gradient.

#pragma once

#include "cuda/gpu.cuh"
#include "math/kl_div_with_logits.h"

namespace alignfast {

// [W, B, C] with neighbouring classes side by side; strides in elements, the first 0 where there is one witness.
template <class T>
struct LogitsBatch {
  const T* data;
  int64_t witness_stride, sample_stride;
};

template <class T>
struct KlBatch {
  LogitsBatch<T> student, teacher;
  int64_t samples, witnesses;
  int classes;
  double temperature;
  Direction direction;
  Combine combine;
  // Of a sample's loss in the one whose gradient is wanted.
  double weight;
  // [W, B]: found where there is no gradient or the mean over witnesses is taken. Otherwise they are known from a first
  // call, and tell which witnesses have a gradient.
  double* divergences;
  // [B, C] or null.
  Wide<T>* gradient;
  // How often the weight of a logit doubles where the logit grows by 1, and 1 / temperature.
  Wide<T> doublings, inverse_temperature;
};

// What the divergences of one sample come to, and how many of them that loss is made of.
struct CombinedLoss {
  double loss;
  int64_t parts;
};

// Those that are equal to the largest or smallest share its gradient evenly. NaN wins, as it does in torch.amax.
__device__ inline CombinedLoss combined_loss(const double* divergences, int64_t samples, int64_t witnesses,
                                             Combine combine) {
  CombinedLoss found{divergences[0], 1};
  for (int64_t w = 1; w < witnesses; ++w) {
    const double value = divergences[w * samples];
    const bool better = combine == Combine::max ? value > found.loss : value < found.loss;
    if (combine == Combine::mean) {
      found = {found.loss + value, w + 1};
    } else if (better || (isnan(value) && !isnan(found.loss))) {
      found = {value, 1};
    } else if (value == found.loss) {
      ++found.parts;
    }
  }
  if (combine == Combine::mean) found.loss /= static_cast<double>(witnesses);
  return found;
}

template <class V>
struct LogitBounds {
  V student, teacher;
};

struct LargerBounds {
  template <class V>
  __device__ LogitBounds<V> operator()(const LogitBounds<V>& a, const LogitBounds<V>& b) const {
    return {larger(a.student, b.student), larger(a.teacher, b.teacher)};
  }
};

template <class V>
__device__ __forceinline__ LogitBounds<V> from_lane_across(const LogitBounds<V>& value, int step) {
  return {from_lane_across(value.student, step), from_lane_across(value.teacher, step)};
}

struct AddSums {
  __device__ DivergenceSums operator()(const DivergenceSums& a, const DivergenceSums& b) const {
    return {a.q + b.q, a.p + b.p, a.q_logs + b.q_logs, a.p_logs + b.p_logs};
  }
};

__device__ __forceinline__ DivergenceSums from_lane_across(const DivergenceSums& value, int step) {
  return {from_lane_across(value.q, step), from_lane_across(value.p, step), from_lane_across(value.q_logs, step),
          from_lane_across(value.p_logs, step)};
}

// What the first threads find for all, since double precision is slow on most GPUs.
struct KlShared {
  enum Quotient { q_log, p_log, weight_over_q, weight_over_p, p_over_q, COUNT };
  double quotients[COUNT];
  // Of jsd alone, which needs it before it has the logarithms to average.
  double log_ratio;

  // Both to be followed by a barrier.
  __device__ void set_log_ratio(const DivergenceSums& sums) {
    if (threadIdx.x == 0) log_ratio = log(sums.p) - log(sums.q);
  }

  // The weight is one of `parts` equal ones.
  __device__ void set_quotients(const DivergenceSums& sums, double weight, double parts) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= COUNT) return;
    const bool weighed = i == weight_over_q || i == weight_over_p;
    const double numerator = i == q_log ? sums.q_logs : i == p_log ? sums.p_logs : i == p_over_q ? sums.p : weight;
    const double sum = i == p_log || i == weight_over_p ? sums.p : sums.q;
    quotients[i] = numerator / (weighed ? sum * parts : sum);
  }

  __device__ double divergence(Direction direction, double temperature) const {
    const double in_q = quotients[q_log], in_p = quotients[p_log];
    const double ratio = temperature * log(quotients[p_over_q]);
    const double value = direction == Direction::forward     ? temperature * (in_p - ratio)
                         : direction == Direction::reverse   ? temperature * (ratio - in_q)
                         : direction == Direction::symmetric ? 0.5 * temperature * (in_p - in_q)
                                                             : 0.5 * temperature * temperature * (in_p + in_q);
    // Never negative but by rounding.
    return value < 0 ? 0 : value;
  }

  // As of Direction::symmetric, with zeros for the terms that the direction has not.
  template <class V>
  __device__ GradientFactors<V> factors(Direction direction, double temperature) const {
    const double over_q = quotients[weight_over_q], over_p = quotients[weight_over_p];
    const double half = direction == Direction::symmetric ? 0.5 : 1;
    const double plain = direction == Direction::reverse || direction == Direction::jsd ? 0 : half * temperature;
    const double logs = direction == Direction::forward ? 0 : direction == Direction::jsd ? -0.5 * temperature : half;
    return {static_cast<V>(plain * over_q), static_cast<V>(plain * over_p), static_cast<V>(logs * over_q),
            static_cast<V>(quotients[q_log])};
  }
};

// One sample and witness. KEPT is for rows of at most one pack a thread, whose logits stay in registers; those of
// longer rows are read again in every pass, from the cache.
template <class T, bool JSD, int THREADS, bool KEPT>
class KlRow {
  using V = Wide<T>;
  // 16 bytes and no more, as much of a row is held at once.
  static constexpr int N = 16 / static_cast<int>(sizeof(T));

 public:
  __device__ KlRow(const KlBatch<T>& batch, int64_t witness, int64_t sample, KlShared& shared)
      : batch_(batch),
        student_(batch.student.data + sample * batch.student.sample_stride),
        teacher_(batch.teacher.data + witness * batch.teacher.witness_stride + sample * batch.teacher.sample_stride),
        shift_(misalignment(student_)),
        teacher_in_packs_(misalignment(teacher_) == shift_),
        shared_(shared) {}

  // Leaves the divergence with what is shared; where `gradient` is not null, the share in it that one of `parts` has is
  // written there, or added.
  __device__ void run(int64_t parts, bool add, V* gradient) {
    find_bounds();
    DivergenceSums sums = block_fold<THREADS>(first_sums(), AddSums());
    if constexpr (JSD) {
      shared_.set_log_ratio(sums);
      __syncthreads();
      const DivergenceSums logs = block_fold<THREADS>(mixture_sums(), AddSums());
      sums.q_logs = logs.q_logs;
      sums.p_logs = logs.p_logs;
    }
    shared_.set_quotients(sums, batch_.weight, static_cast<double>(parts));
    __syncthreads();
    if (gradient != nullptr) write_gradient(add, gradient);
  }

 private:
  // What the classes of a pack contribute. `log` is delta, for jsd the log of q to the mixture.
  struct Terms {
    V weight_q[N], weight_p[N], log[N];
  };

  // How many elements before `row` packs may begin.
  __device__ static int misalignment(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
  }

  // Calls visit(first) for the packs of this thread; `first` is the first class of one.
  template <class Visit>
  __device__ void each_pack(Visit visit) {
    int first = static_cast<int>(threadIdx.x) * N - shift_;
    if constexpr (KEPT) {
      if (first < batch_.classes) visit(first);
    } else {
      for (; first < batch_.classes; first += THREADS * N) visit(first);
    }
  }

  __device__ bool inside(int i) const { return 0 <= i && i < batch_.classes; }

  // Logits outside the row count as the lowest.
  __device__ void load(const T* row, int first, bool in_packs, T (&to)[N]) const {
    if (in_packs && inside(first) && inside(first + N - 1)) return load_pack(row + first, to);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = inside(first + i) ? row[first + i] : narrow<T>(V(LOWEST_LOGIT));
  }

  __device__ void load(int first) {
    load(student_, first, true, student_logits_);
    load(teacher_, first, teacher_in_packs_, teacher_logits_);
  }

  __device__ void find_bounds() {
    LogitBounds<V> high{V(LOWEST_LOGIT), V(LOWEST_LOGIT)};
    each_pack([&](int first) {
      load(first);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        high = LargerBounds()(high, LogitBounds<V>{widen(student_logits_[i]), widen(teacher_logits_[i])});
      }
    });
    bounds_ = block_fold<THREADS>(high, LargerBounds());
  }

  __device__ Terms terms(int first) {
    if constexpr (!KEPT) load(first);
    Terms found;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const V a = raised_logit(widen(student_logits_[i])) - bounds_.student;
      const V b = raised_logit(widen(teacher_logits_[i])) - bounds_.teacher;
      found.log[i] = b - a;
      found.weight_q[i] = inside(first + i) ? exp2_below_zero(a * batch_.doublings) : V(0);
      found.weight_p[i] = inside(first + i) ? exp2_below_zero(b * batch_.doublings) : V(0);
    }
    return found;
  }

  __device__ DivergenceSums first_sums() {
    DivergenceSums sums{};
    each_pack([&](int first) {
      const Terms found = terms(first);
      V q = 0, p = 0, q_logs = 0, p_logs = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        q += found.weight_q[i];
        p += found.weight_p[i];
        if constexpr (JSD) continue;
        q_logs += found.weight_q[i] * found.log[i];
        p_logs += found.weight_p[i] * found.log[i];
      }
      sums = AddSums()(sums, {q, p, q_logs, p_logs});
    });
    return sums;
  }

  __device__ LogsToMixture<V> mixture(V delta) const {
    return logs_to_mixture(delta * batch_.inverse_temperature - static_cast<V>(shared_.log_ratio));
  }

  __device__ DivergenceSums mixture_sums() {
    DivergenceSums sums{};
    each_pack([&](int first) {
      const Terms found = terms(first);
      V q_logs = 0, p_logs = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const LogsToMixture<V> logs = mixture(found.log[i]);
        q_logs += found.weight_q[i] * logs.q;
        p_logs += found.weight_p[i] * logs.p;
      }
      sums = AddSums()(sums, {0, 0, q_logs, p_logs});
    });
    return sums;
  }

  __device__ void write_gradient(bool add, V* gradient) {
    const GradientFactors<V> factors = shared_.factors<V>(batch_.direction, batch_.temperature);
    each_pack([&](int first) {
      const Terms found = terms(first);
      V values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const V log = JSD ? mixture(found.log[i]).q : found.log[i];
        const V value = factors.template at<Direction::symmetric>(found.weight_q[i], found.weight_p[i], log);
        // Logits that count as the lowest have no gradient.
        values[i] = widen(student_logits_[i]) < V(LOWEST_LOGIT) ? V(0) : value;
      }
      write_pack(values, first, add, gradient + first);
    });
  }

  __device__ void write_pack(V (&values)[N], int first, bool add, V* to) const {
    if (inside(first) && inside(first + N - 1) && is_aligned(to)) {
      if (add) {
        V before[N];
        load_pack(to, before);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += before[i];
      }
      return store_pack(values, to);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (inside(first + i)) to[i] = add ? to[i] + values[i] : values[i];
    }
  }

  const KlBatch<T>& batch_;
  const T* student_;
  const T* teacher_;
  int shift_;
  bool teacher_in_packs_;
  LogitBounds<V> bounds_;
  T student_logits_[N], teacher_logits_[N];
  KlShared& shared_;
};

template <class T, bool JSD, int THREADS, bool KEPT>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) kl_div_with_logits(KlBatch<T> batch) {
  AF_SHARED(KlShared, shared, 1);
  const bool known = batch.gradient != nullptr && batch.combine != Combine::mean;
  for (int64_t sample = blockIdx.x; sample < batch.samples; sample += gridDim.x) {
    double* divergences = batch.divergences + sample;
    Wide<T>* gradient = batch.gradient == nullptr ? nullptr : batch.gradient + sample * batch.classes;
    CombinedLoss combined{0, batch.witnesses};
    if (known) combined = combined_loss(divergences, batch.samples, batch.witnesses, batch.combine);
    bool add = false;
    for (int64_t w = 0; w < batch.witnesses; ++w) {
      double* divergence = divergences + w * batch.samples;
      if (known && *divergence != combined.loss && !isnan(*divergence)) continue;
      KlRow<T, JSD, THREADS, KEPT> row(batch, w, sample, shared[0]);
      row.run(combined.parts, add, gradient);
      if (!known && threadIdx.x == 0) *divergence = shared[0].divergence(batch.direction, batch.temperature);
      add = true;
    }
  }
}

constexpr int KL_LOSS_THREADS = 512;

// The loss of every sample, or with REDUCED `weight` times their sum, by one block in a fixed order.
template <class V, bool REDUCED>
__global__ void __launch_bounds__(KL_LOSS_THREADS)
    kl_div_with_logits_loss(const double* divergences, int64_t samples, int64_t witnesses, Combine combine,
                            double weight, V* loss) {
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * KL_LOSS_THREADS + threadIdx.x; i < samples;
       i += static_cast<int64_t>(gridDim.x) * KL_LOSS_THREADS) {
    const double value = combined_loss(divergences + i, samples, witnesses, combine).loss;
    if constexpr (REDUCED) {
      sum += value;
    } else {
      loss[i] = static_cast<V>(value);
    }
  }
  if constexpr (REDUCED) {
    sum = block_fold<KL_LOSS_THREADS>(sum, Sum());
    if (threadIdx.x == 0) *loss = static_cast<V>(weight * sum);
  }
}

constexpr int KL_BACKWARD_THREADS = 256;

// result <- factor gradient, with one factor for all rows or, `stride` apart, one for each.
template <class V>
struct KlBackward {
  const V* gradient;
  const V* factors;
  int64_t stride, classes, elements;
  Dtype dtype;
  void* result;
};

template <class V>
__global__ void __launch_bounds__(KL_BACKWARD_THREADS) kl_div_with_logits_backward(KlBackward<V> backward) {
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * KL_BACKWARD_THREADS + threadIdx.x) * static_cast<int64_t>(PACK<V>);
  if (first >= backward.elements) return;
  V values[PACK<V>];
  const bool whole = first + PACK<V> <= backward.elements;
  if (whole) load_pack(backward.gradient + first, values);
#pragma unroll
  for (int i = 0; i < PACK<V>; ++i) {
    if (first + i >= backward.elements) break;
    const int64_t row = backward.stride == 0 ? 0 : (first + i) / backward.classes;
    const V factor = backward.factors[row * backward.stride];
    if (whole) {
      values[i] *= factor;
    } else {
      store_value(backward.gradient[first + i] * factor, backward.dtype, backward.result, first + i);
    }
  }
  if (whole) store_values(values, backward.dtype, backward.result, first);
}

}  // namespace alignfast
