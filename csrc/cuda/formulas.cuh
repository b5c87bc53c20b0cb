// The mathematics of an entry of the vocabulary: logit transform, divergences, log softmax. The
// formulas and their reasons are those of softprompt_fast/backends/formulas.py and of
// csrc/cpu/tiles.h.
//
// Compiled with -fmad=false: only __fmaf_rn is fused, so that equal arithmetic gives equal numbers
// wherever it stands.
#pragma once

#include <cmath>

#include "rows.h"

#define SPF_DEVICE static __device__ __forceinline__

namespace softprompt_fast::cuda {

constexpr float INF = INFINITY;

struct Transform {
  bool capped;
  float gain;          // logit_scale / temperature
  float inner, outer;  // z = outer * tanh(inner * (raw + bias)) where capped
  float z_to_tanh;

  explicit Transform(const Rows& rows)
      : capped(rows.softcap != 0.0), gain(float(rows.logit_scale / rows.temperature)),
        inner(capped ? float(rows.logit_scale / rows.softcap) : 0.0f),
        outer(float(rows.softcap / rows.temperature)),
        z_to_tanh(capped ? float(rows.temperature / rows.softcap) : 0.0f) {}

  __device__ __forceinline__ float z(float x) const {
    return capped ? outer * tanhf(inner * x) : gain * x;
  }

  // d z / d raw
  __device__ __forceinline__ float slope(float z) const {
    if (!capped) return gain;
    const float tanh = z * z_to_tanh;
    return gain * (1.0f - tanh * tanh);
  }
};

// The softmax of a row, from its largest logit and the sum of e^(z - top). A difference z - top is
// exact where it matters; z - (top + log_sum) would be rounded to the size of the logits.
struct Softmax {
  float top, log_sum, inverse;

  Softmax() = default;
  __device__ __forceinline__ Softmax(float top, float sum)
      : top(top), log_sum(logf(sum)), inverse(1.0f / sum) {}

  __device__ __forceinline__ float log(float z) const { return (z - top) - log_sum; }
  __device__ __forceinline__ float operator()(float z) const { return expf(z - top) * inverse; }
};

// The softmax of a row whose target was left out of `others`, the sum of e^(z - top): with the odds
// of all other entries against the target, -log q = log(1 + odds) and 1 - q = odds / (1 + odds)
// keep the relative accuracy of a confident row.
struct Likelihood {
  float nll, missing;  // -log q and 1 - q of the target

  __device__ __forceinline__ Likelihood(float top, float others, float z_target) {
    const float log_odds = (top - z_target) + logf(others);
    const float less = expf(-fabsf(log_odds));
    nll = fmaxf(log_odds, 0.0f) + log1pf(less);
    missing = (log_odds > 0.0f ? 1.0f : less) / (1.0f + less);
  }
};

struct ValueSlope {
  float value, slope;
};

// What is taken off the rates of a row: the rate of the student's most probable entry.
struct Shift {
  float rate;
  bool ruled_out;  // the teacher gives that entry much less probability
};

constexpr float SMALL = 0.5f, RULED_OUT = 1.0f, FAR = 30.0f;

// p * x, where an entry without probability contributes nothing even if x is infinite.
SPF_DEVICE float times(float p, float x) { return p == 0.0f ? 0.0f : p * x; }

// e^d - 1 - d for |d| <= SMALL, by its Taylor series.
SPF_DEVICE float excess(float d) {
  float s = __fmaf_rn(d, 1.0f / 3628800, 1.0f / 362880);
  s = __fmaf_rn(s, d, 1.0f / 40320);
  s = __fmaf_rn(s, d, 1.0f / 5040);
  s = __fmaf_rn(s, d, 1.0f / 720);
  s = __fmaf_rn(s, d, 1.0f / 120);
  s = __fmaf_rn(s, d, 1.0f / 24);
  s = __fmaf_rn(s, d, 1.0f / 6);
  s = __fmaf_rn(s, d, 0.5f);
  return s * d * d;
}

// A divergence gives the value and the slope (by log q, up to a multiple of q) of an entry, from p,
// q and d = log q - log p. BALANCED: the slopes sum to zero but for rounding, so that one sweep
// gives value and gradient.
struct OneTarget {
  static constexpr bool TEACHER = false, BALANCED = false, ENTRIES = false;
};

// A kernel of its own for the registers that it takes.
struct SeveralTargets {
  static constexpr bool TEACHER = false, BALANCED = false, ENTRIES = true;
};

struct ForwardKL {
  static constexpr bool TEACHER = true, BALANCED = true, ENTRIES = false;

  __device__ __forceinline__ Shift shift(float) const { return {0.0f, false}; }
  __device__ __forceinline__ ValueSlope at(float p, float q, float d, Shift) const {
    return {fabsf(d) < SMALL ? p * excess(d) : q - p - times(p, d), q - p};
  }
};

struct ReverseKL {
  static constexpr bool TEACHER = true, BALANCED = false, ENTRIES = false;

  __device__ __forceinline__ Shift shift(float d_peak) const { return {d_peak, false}; }
  __device__ __forceinline__ ValueSlope at(float p, float q, float d, Shift shift) const {
    return {fabsf(d) < SMALL ? q * excess(-d) : p - q + times(q, d), times(q, d - shift.rate)};
  }
};

struct JensenShannon {
  static constexpr bool TEACHER = true, BALANCED = false, ENTRIES = false;
  float p_part, q_part, log_q_part, p_over_q;  // of the mixture m = beta p + (1 - beta) q

  // from double: 1 - beta keeps its digits
  explicit JensenShannon(double beta)
      : p_part(float(beta)), q_part(float(1.0 - beta)), log_q_part(float(std::log1p(-beta))),
        p_over_q(float(beta / (1.0 - beta))) {}

  struct Ratios {
    float p, q;  // log(p / m), log(q / m)
    float rate;  // log(q / m); in a row that is ruled out log(q_part * q / m), a small number there
  };

  __device__ __forceinline__ Ratios over_mixture(float d, bool ruled_out) const {
    const float constant = ruled_out ? log_q_part : 0.0f;
    if (d > -FAR) {
      const float ratio = expf(-d);  // p / q
      // m / q - 1; where ruled out m / (q_part q) - 1
      const float above = ruled_out ? p_over_q * ratio : p_part * expm1f(-d);
      const float rate = -(above < -0.5f ? logf(q_part + p_part * ratio) : log1pf(above));
      return {(rate - constant) - d, rate - constant, rate};
    }
    // p / q may overflow: from p's side
    const float m_over_p = logf(p_part + q_part * expf(d));
    const float rate = d - m_over_p + constant;
    return {-m_over_p, rate - constant, rate};
  }

  __device__ __forceinline__ Shift shift(float d_peak) const {
    const bool ruled_out = d_peak > RULED_OUT;
    return {over_mixture(d_peak, ruled_out).rate, ruled_out};
  }
  __device__ __forceinline__ ValueSlope at(float p, float q, float d, Shift shift) const {
    const Ratios over = over_mixture(d, shift.ruled_out);
    return {p_part * times(p, over.p) + q_part * times(q, over.q),
            q_part * times(q, over.rate - shift.rate)};
  }
};

// The power of two that lifts numbers up to `bound` into [2^13, 2^14): high in fp16's range, with
// room for the bound's own rounding. 1 where there is no such number.
SPF_DEVICE float lift_to_fp16(float bound) {
  if (!(bound > 0.0f && bound < INF)) return 1.0f;
  const int exponent = 13 - ilogbf(bound);
  return ldexpf(1.0f, exponent > 126 ? 126 : exponent < -126 ? -126 : exponent);
}

}  // namespace softprompt_fast::cuda
