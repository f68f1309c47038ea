#include <cmath>

#include "cpu/kl_div_with_logits.h"
#include "cpu/lanes.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

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

// Classes are taken this many at a time, and rows filled up to whole blocks, so that no loop has a remainder.
constexpr int64_t BLOCK = 4 * LANES;

constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto times = [](auto a, auto b) { return a * b; };
constexpr auto largest = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto smallest = [](auto a, auto b) { return a < b ? a : b; };

// What blocks are folded into: element i of each goes to lane i.
template <class V, class Combine>
struct BlockFold {
  Combine combine;
  Lanes<V> lanes[4];

  BlockFold(V neutral, Combine combine) : combine(combine) {
    for (Lanes<V>& lane : lanes) lane = Lanes<V>::filled(neutral);
  }

  void add(const V* x) {
    for (int j = 0; j < 4; ++j) lanes[j] = lanes[j].with(Lanes<V>::load(x + j * LANES), combine);
  }

  void add_product(const V* x, const V* y) {
    for (int j = 0; j < 4; ++j) {
      const Lanes<V> product = Lanes<V>::load(x + j * LANES).with(Lanes<V>::load(y + j * LANES), times);
      lanes[j] = lanes[j].with(product, combine);
    }
  }

  V result() const {
    return lanes[0].with(lanes[1], combine).with(lanes[2].with(lanes[3], combine), combine).folded(combine);
  }
};

template <class V>
struct BlockSum : BlockFold<V, decltype(plus)> {
  BlockSum() : BlockFold<V, decltype(plus)>(0, plus) {}

  double total() const { return static_cast<double>(this->result()); }
};

// A row of logits as values of V: where it lies, or widened and filled up in a buffer.
template <class V>
struct LogitsReader {
  const LogitsRow& row;
  int64_t classes;
  bool direct;
  int64_t held = -1;
  alignas(64) V buffer[CHUNK];

  LogitsReader(const LogitsRow& row, int64_t classes)
      : row(row), classes(classes), direct(is(row.dtype, V()) && row.stride == 1) {}

  // The whole blocks from `start` to the end of its chunk, or else the block of which the row fills only a part.
  const V* at(int64_t start) {
    if (direct && start + BLOCK <= classes) return static_cast<const V*>(row.data) + start;
    const int64_t first = direct ? start : start / CHUNK * CHUNK;
    if (first != held) hold(first);
    return buffer + (start - first);
  }

  [[gnu::noinline]] void hold(int64_t first) {
    const int64_t count = smaller(CHUNK, classes - first);
    with_type(row.dtype, [&](auto type) {
      widen_all(static_cast<const decltype(type)*>(row.data) + first * row.stride, row.stride, count, buffer);
    });
    for (int64_t i = count; i % BLOCK != 0; ++i) buffer[i] = V(LOWEST_LOGIT);
    held = first;
  }
};

// What the classes of a block contribute. `log` is delta; the second pass of jsd makes it the log of q to the mixture.
template <class V>
struct Terms {
  alignas(64) V weight_q[BLOCK], weight_p[BLOCK], log[BLOCK];
};

template <class V>
struct Bounds {
  V student, teacher;
};

// Blocks that lie in one piece.
template <class V>
struct Stretch {
  int64_t start, end;
  const V* student_logits;
  const V* teacher_logits;

  const V* student(int64_t i) const { return student_logits + (i - start); }
  const V* teacher(int64_t i) const { return teacher_logits + (i - start); }
};

// `doublings` is how often the weight of a logit doubles where the logit grows by 1.
template <class V, bool RAISED>
inline void find_weights(const V* __restrict student, const V* __restrict teacher, Bounds<V> bounds, V doublings,
                         Terms<V>& __restrict terms) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    const V a = (RAISED ? raised_logit(student[i]) : student[i]) - bounds.student;
    const V b = (RAISED ? raised_logit(teacher[i]) : teacher[i]) - bounds.teacher;
    terms.log[i] = b - a;
    terms.weight_q[i] = exp2_below_zero(a * doublings);
    terms.weight_p[i] = exp2_below_zero(b * doublings);
  }
}

// Replaces delta by the log of q to the mixture.
template <class V>
inline void find_logs_to_mixture(V inverse_temperature, V log_ratio, V* __restrict log, V* __restrict log_p) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    const LogsToMixture<V> logs = logs_to_mixture(log[i] * inverse_temperature - log_ratio);
    log[i] = logs.q;
    log_p[i] = logs.p;
  }
}

// One sample. Rows of up to KEPT blocks keep their terms, longer ones find them again in every pass. The passes are not
// inlined into one another: a loop of its own has the registers for its sums and coefficients.
template <class V, Direction D>
struct Row {
  static constexpr int64_t KEPT = 48 * sizeof(float) / sizeof(V);

  const KlSample& sample;
  int64_t classes;
  LogitsReader<V> student, teacher;
  Bounds<V> bounds;
  bool raised, kept;
  V inverse_temperature, doublings;
  Terms<V> terms[KEPT];

  explicit Row(const KlSample& sample)
      : sample(sample),
        classes(sample.classes),
        student(sample.student, classes),
        teacher(sample.teacher, classes),
        kept(classes <= KEPT * BLOCK),
        inverse_temperature(static_cast<V>(1 / sample.temperature)),
        doublings(static_cast<V>(LOG2_E / sample.temperature)) {}

  Stretch<V> stretch_at(int64_t start) {
    const int64_t end = smaller(classes, (start / CHUNK + 1) * CHUNK);
    const int64_t whole = end / BLOCK * BLOCK;
    return {start, start < whole ? whole : end, student.at(start), teacher.at(start)};
  }

  [[gnu::noinline]] void find_bounds() {
    BlockFold student_high(V(LOWEST_LOGIT), largest), teacher_high(V(LOWEST_LOGIT), largest);
    BlockFold low(V(LOWEST_LOGIT), smallest);
    for (int64_t i = 0; i < classes;) {
      for (const Stretch<V> stretch = stretch_at(i); i < stretch.end; i += BLOCK) {
        student_high.add(stretch.student(i));
        teacher_high.add(stretch.teacher(i));
        low.add(stretch.student(i));
        low.add(stretch.teacher(i));
      }
    }
    bounds = {student_high.result(), teacher_high.result()};
    raised = low.result() < V(LOWEST_LOGIT);
  }

  Terms<V>& place_of(int64_t start) { return terms[kept ? start / BLOCK : 0]; }

  Terms<V>& find_terms(const Stretch<V>& stretch, int64_t start) {
    Terms<V>& found = place_of(start);
    if (raised) {
      find_weights<V, true>(stretch.student(start), stretch.teacher(start), bounds, doublings, found);
    } else {
      find_weights<V, false>(stretch.student(start), stretch.teacher(start), bounds, doublings, found);
    }
    for (int64_t i = classes - start; i < BLOCK; ++i) found.weight_q[i] = found.weight_p[i] = 0;
    return found;
  }

  Terms<V>& terms_of(const Stretch<V>& stretch, int64_t start) {
    return kept ? place_of(start) : find_terms(stretch, start);
  }

  // Calls visit(stretch, i) for every block of a chunk.
  template <class Visit>
  void each_block(int64_t chunk, Visit visit) {
    for (int64_t i = chunk; i < smaller(classes, chunk + CHUNK);) {
      for (const Stretch<V> stretch = stretch_at(i); i < stretch.end; i += BLOCK) visit(stretch, i);
    }
  }

  [[gnu::noinline]] DivergenceSums first_sums() {
    constexpr bool WITH_Q_LOGS = D == Direction::reverse || D == Direction::symmetric;
    constexpr bool WITH_P_LOGS = D == Direction::forward || D == Direction::symmetric;
    DivergenceSums totals{};
    for (int64_t chunk = 0; chunk < classes; chunk += CHUNK) {
      BlockSum<V> q, p, q_logs, p_logs;
      each_block(chunk, [&](const Stretch<V>& stretch, int64_t i) {
        const Terms<V>& found = find_terms(stretch, i);
        q.add(found.weight_q);
        p.add(found.weight_p);
        if constexpr (WITH_Q_LOGS) q_logs.add_product(found.weight_q, found.log);
        if constexpr (WITH_P_LOGS) p_logs.add_product(found.weight_p, found.log);
      });
      totals.q += q.total();
      totals.p += p.total();
      if constexpr (WITH_Q_LOGS) totals.q_logs += q_logs.total();
      if constexpr (WITH_P_LOGS) totals.p_logs += p_logs.total();
    }
    return totals;
  }

  [[gnu::noinline]] void add_logs_to_mixture(DivergenceSums& totals, double log_ratio) {
    for (int64_t chunk = 0; chunk < classes; chunk += CHUNK) {
      BlockSum<V> q_logs, p_logs;
      each_block(chunk, [&](const Stretch<V>& stretch, int64_t i) {
        Terms<V>& found = terms_of(stretch, i);
        alignas(64) V log_p[BLOCK];
        find_logs_to_mixture(inverse_temperature, static_cast<V>(log_ratio), found.log, log_p);
        q_logs.add_product(found.weight_q, found.log);
        p_logs.add_product(found.weight_p, log_p);
      });
      totals.q_logs += q_logs.total();
      totals.p_logs += p_logs.total();
    }
  }

  [[gnu::noinline]] void write_gradient(const DivergenceSums& sums, double log_ratio, double weight, bool add,
                                        V* gradient) {
    const GradientFactors<V> factors = gradient_factors<V, D>(sums, sample.temperature, weight);
    for (int64_t chunk = 0; chunk < classes; chunk += CHUNK) {
      each_block(chunk, [&](const Stretch<V>& stretch, int64_t i) {
        Terms<V>& found = terms_of(stretch, i);
        if constexpr (D == Direction::jsd) {
          alignas(64) V log_p[BLOCK];
          if (!kept) find_logs_to_mixture(inverse_temperature, static_cast<V>(log_ratio), found.log, log_p);
        }
        write_block(found, factors, smaller(BLOCK, classes - i), add, gradient + i);
        if (raised) zero_raised(stretch.student(i), smaller(BLOCK, classes - i), gradient + i);
      });
    }
  }

  static void write_block(const Terms<V>& __restrict found, const GradientFactors<V>& factors, int64_t count, bool add,
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
  static void zero_raised(const V* __restrict logits, int64_t count, V* __restrict gradient) {
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
