#include <cmath>

#include "cpu/kl_div_with_logits.h"
#include "cpu/lanes.h"

namespace alignfast::AF_ISA {

namespace {

template <class Visit>
auto with_type(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::float64:
      return visit(double());
    case Dtype::float32:
      return visit(float());
    case Dtype::bfloat16:
      return visit(BFloat16());
    case Dtype::float16:
      break;
  }
  return visit(Half());
}

template <class Visit>
auto with_direction(Direction direction, Visit visit) {
  switch (direction) {
    case Direction::forward:
      return visit.template operator()<Direction::forward>();
    case Direction::reverse:
      return visit.template operator()<Direction::reverse>();
    case Direction::symmetric:
      return visit.template operator()<Direction::symmetric>();
    case Direction::jsd:
      break;
  }
  return visit.template operator()<Direction::jsd>();
}

template <class T, class V>
void widen_all(const T* __restrict from, int64_t stride, int64_t count, V* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<V>(widen(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<V>(widen(from[i * stride]));
  }
}

bool is(Dtype dtype, float) { return dtype == Dtype::float32; }
bool is(Dtype dtype, double) { return dtype == Dtype::float64; }

// A row of logits as values of V, a chunk at a time: where they lie, or widened into a buffer.
template <class V>
struct LogitsReader {
  const LogitsRow& row;
  int64_t held = -1;
  V buffer[CHUNK];

  explicit LogitsReader(const LogitsRow& row) : row(row) {}

  const V* at(int64_t start, int64_t count) {
    if (is(row.dtype, V()) && row.stride == 1) return static_cast<const V*>(row.data) + start;
    if (held != start) {
      with_type(row.dtype, [&](auto type) {
        widen_all(static_cast<const decltype(type)*>(row.data) + start * row.stride, row.stride, count, buffer);
      });
      held = start;
    }
    return buffer;
  }
};

// What the classes of a chunk contribute. `log` is delta; the second pass of jsd makes it the log of q to the mixture.
template <class V>
struct Terms {
  V weight_q[CHUNK], weight_p[CHUNK], log[CHUNK];
};

template <class V>
struct Bounds {
  V student, teacher, lowest_student;
};

template <class V>
void find_terms(const V* __restrict student, const V* __restrict teacher, int64_t count, const Bounds<V>& largest,
                V doublings, Terms<V>& terms) {
  for (int64_t i = 0; i < count; ++i) {
    const V a = raised_logit(student[i]) - largest.student, b = raised_logit(teacher[i]) - largest.teacher;
    terms.log[i] = b - a;
    terms.weight_q[i] = exp2_below_zero(a * doublings);
    terms.weight_p[i] = exp2_below_zero(b * doublings);
  }
}

template <class V>
double sum_of_products(const V* __restrict x, const V* __restrict y, int64_t count) {
  V products[CHUNK];
  for (int64_t i = 0; i < count; ++i) products[i] = x[i] * y[i];
  return sum_of(products, count);
}

// One sample. Rows of up to KEPT chunks keep their terms, longer ones find them again in every pass.
template <class V, Direction D>
struct Row {
  static constexpr int64_t KEPT = 12 / sizeof(V);

  const KlSample& sample;
  LogitsReader<V> student, teacher;
  Bounds<V> bounds;
  V inverse_temperature;
  // A logit's weight doubles with 1 / doublings.
  V doublings;
  bool kept;
  Terms<V> terms[KEPT];

  explicit Row(const KlSample& sample)
      : sample(sample),
        student(sample.student),
        teacher(sample.teacher),
        bounds{LOWEST_LOGIT, LOWEST_LOGIT, 0},
        inverse_temperature(static_cast<V>(1 / sample.temperature)),
        doublings(static_cast<V>(LOG2_E / sample.temperature)),
        kept(sample.classes <= KEPT * CHUNK) {}

  template <class Visit>
  void each_chunk(Visit visit) {
    for (int64_t start = 0; start < sample.classes; start += CHUNK) {
      visit(start, smaller(CHUNK, sample.classes - start));
    }
  }

  void find_bounds() {
    each_chunk([&](int64_t start, int64_t count) {
      const V* logits = student.at(start, count);
      bounds.student = larger(bounds.student, max_of(logits, count, V(LOWEST_LOGIT)));
      bounds.lowest_student =
          reduced(logits, count, bounds.lowest_student, [](auto x, auto y) { return x < y ? x : y; });
      bounds.teacher = larger(bounds.teacher, max_of(teacher.at(start, count), count, V(LOWEST_LOGIT)));
    });
  }

  Terms<V>& found_terms(int64_t start, int64_t count) {
    Terms<V>& found = terms[kept ? start / CHUNK : 0];
    find_terms(student.at(start, count), teacher.at(start, count), count, bounds, doublings, found);
    return found;
  }

  Terms<V>& terms_of(int64_t start, int64_t count) { return kept ? terms[start / CHUNK] : found_terms(start, count); }

  DivergenceSums first_sums() {
    DivergenceSums sums{};
    each_chunk([&](int64_t start, int64_t count) {
      const Terms<V>& found = found_terms(start, count);
      sums.q += sum_of(found.weight_q, count);
      sums.p += sum_of(found.weight_p, count);
      if constexpr (D == Direction::reverse || D == Direction::symmetric) {
        sums.q_logs += sum_of_products(found.weight_q, found.log, count);
      }
      if constexpr (D == Direction::forward || D == Direction::symmetric) {
        sums.p_logs += sum_of_products(found.weight_p, found.log, count);
      }
    });
    return sums;
  }

  void add_logs_to_mixture(DivergenceSums& sums, double log_ratio) {
    each_chunk([&](int64_t start, int64_t count) {
      Terms<V>& found = terms_of(start, count);
      V log_p[CHUNK];
      to_mixture(found, count, static_cast<V>(log_ratio), log_p);
      sums.q_logs += sum_of_products(found.weight_q, found.log, count);
      sums.p_logs += sum_of_products(found.weight_p, log_p, count);
    });
  }

  void to_mixture(Terms<V>& found, int64_t count, V log_ratio, V* __restrict log_p) const {
    for (int64_t i = 0; i < count; ++i) {
      const LogsToMixture<V> logs = logs_to_mixture(found.log[i] * inverse_temperature - log_ratio);
      found.log[i] = logs.q;
      log_p[i] = logs.p;
    }
  }

  void write_gradient(const DivergenceSums& sums, double log_ratio, double weight, bool add, V* gradient) {
    const GradientFactors<V> factors = gradient_factors<V, D>(sums, sample.temperature, weight);
    each_chunk([&](int64_t start, int64_t count) {
      Terms<V>& found = terms_of(start, count);
      if constexpr (D == Direction::jsd) {
        V log_p[CHUNK];
        if (!kept) to_mixture(found, count, static_cast<V>(log_ratio), log_p);
      }
      write_chunk(found, factors, count, add, gradient + start);
      if (bounds.lowest_student < V(LOWEST_LOGIT)) zero_raised(start, count, gradient + start);
    });
  }

  static void write_chunk(const Terms<V>& found, const GradientFactors<V>& factors, int64_t count, bool add,
                          V* __restrict gradient) {
    const auto at = [&](int64_t i) {
      return factors.template at<D>(found.weight_q[i], found.weight_p[i], found.log[i]);
    };
    if (add) {
      for (int64_t i = 0; i < count; ++i) gradient[i] += at(i);
    } else {
      for (int64_t i = 0; i < count; ++i) gradient[i] = at(i);
    }
  }

  // Logits that count as the lowest have no gradient.
  void zero_raised(int64_t start, int64_t count, V* __restrict gradient) {
    const V* logits = student.at(start, count);
    for (int64_t i = 0; i < count; ++i) gradient[i] = logits[i] < V(LOWEST_LOGIT) ? V(0) : gradient[i];
  }

  double run(double weight, bool add, V* gradient) {
    find_bounds();
    DivergenceSums sums = first_sums();
    const double log_ratio = std::log(sums.p / sums.q);
    if constexpr (D == Direction::jsd) add_logs_to_mixture(sums, log_ratio);
    if (gradient != nullptr) write_gradient(sums, log_ratio, weight, add, gradient);
    return divergence<D>(sums, log_ratio, sample.temperature);
  }
};

}  // namespace

double kl_div_with_logits(const KlSample& sample, double weight, bool add, void* gradient) {
  return with_direction(sample.direction, [&]<Direction D>() {
    return sample.float64 ? Row<double, D>(sample).run(weight, add, static_cast<double*>(gradient))
                          : Row<float, D>(sample).run(weight, add, static_cast<float*>(gradient));
  });
}

void kl_div_with_logits_backward(const void* gradient, bool float64, double factor, Dtype dtype, int64_t count,
                                 void* result) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto scale = [&](const auto* __restrict from, auto by, T* __restrict to) {
      for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(static_cast<Wide<T>>(from[i] * by));
    };
    if (float64) {
      scale(static_cast<const double*>(gradient), factor, static_cast<T*>(result));
    } else {
      scale(static_cast<const float*>(gradient), static_cast<float>(factor), static_cast<T*>(result));
    }
  });
}

}  // namespace alignfast::AF_ISA
