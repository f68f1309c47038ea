// Divergences between two softmax distributions, per class and per row; alignfast/ops/kl_div_with_logits.py has the
// definitions. With a and b the student's and teacher's logits less their largest, e^(a / T) and e^(b / T) are the
// weights of the distributions q and p before they are divided by their sums, and delta = b - a, so that
// log(p / q) = delta / T - log(sum of p's weights / sum of q's). Equal logits hence differ by exactly zero.

#pragma once

#include "math/exp.h"
#include "math/scalar.h"

namespace alignfast {

enum class Direction { forward, reverse, symmetric, jsd };

// Of several witnesses.
enum class Combine { mean, max, min };

// Stands in for -inf, so that a masked class costs a large but finite divergence and a finite gradient.
constexpr float LOWEST_LOGIT = -1e5f;

// NaN stays NaN.
template <class V>
AF_HOST_DEVICE inline V raised_logit(V logit) {
  return logit < V(LOWEST_LOGIT) ? V(LOWEST_LOGIT) : logit;
}

// log(p / m) and log(q / m) with m = (p + q) / 2, of log(p / q).
template <class V>
struct LogsToMixture {
  V p, q;
};

template <class V>
AF_HOST_DEVICE inline LogsToMixture<V> logs_to_mixture(V log_ratio) {
  const V log_larger = log_of_two_over_one_plus_exp(log_ratio < 0 ? log_ratio : -log_ratio);
  return {log_larger - (log_ratio < 0 ? -log_ratio : V(0)), log_larger - (log_ratio > 0 ? log_ratio : V(0))};
}

// What a row adds up to: the weights of q and p, and each times a logarithm: delta, or for jsd the logs to the mixture.
struct DivergenceSums {
  double q, p, q_logs, p_logs;
};

// Times T^2; `log_ratio` is log(sums.p / sums.q).
template <Direction D>
AF_HOST_DEVICE inline double divergence(const DivergenceSums& sums, double log_ratio, double temperature) {
  const double in_q = sums.q_logs / sums.q, in_p = sums.p_logs / sums.p;
  double value;
  if constexpr (D == Direction::forward) value = temperature * (in_p - temperature * log_ratio);
  if constexpr (D == Direction::reverse) value = temperature * (temperature * log_ratio - in_q);
  if constexpr (D == Direction::symmetric) value = 0.5 * temperature * (in_p - in_q);
  if constexpr (D == Direction::jsd) value = 0.5 * temperature * temperature * (in_p + in_q);
  // Never negative but by rounding.
  return value < 0 ? 0 : value;
}

// The gradient of a row: q's weight times (`q` + `q_log` (mean - log)), less p's weight times `p`.
template <class V>
struct GradientFactors {
  V q, p, q_log, mean;

  template <Direction D>
  AF_HOST_DEVICE inline V at(V weight_q, V weight_p, V log) const {
    if constexpr (D == Direction::forward) return weight_q * q - weight_p * p;
    if constexpr (D == Direction::symmetric) return weight_q * (q + q_log * (mean - log)) - weight_p * p;
    return weight_q * (q_log * (mean - log));
  }
};

template <class V, Direction D>
AF_HOST_DEVICE inline GradientFactors<V> gradient_factors(const DivergenceSums& sums, double temperature,
                                                          double weight) {
  const double half = D == Direction::symmetric ? 0.5 * weight : weight;
  const double log_factor = D == Direction::jsd ? -0.5 * weight * temperature : half;
  return {static_cast<V>(half * temperature / sums.q), static_cast<V>(half * temperature / sums.p),
          static_cast<V>(log_factor / sums.q), static_cast<V>(sums.q_logs / sums.q)};
}

}  // namespace alignfast
