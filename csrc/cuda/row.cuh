// What is known of a row, one number each, and the gradient of an entry that follows from it.
#pragma once

#include "formulas.cuh"
#include "plan.h"
#include "statistics.cuh"

namespace softprompt_fast::cuda {

// One launch.
struct Task {
  Rows rows;
  Plan plan;
  Transform transform;
  float smoothing, uniform;  // of the target's probability: taken off it, given to each entry
  float nll_weight, divergence_weight;
};

template <class Divergence>
struct Row {
  static constexpr bool TEACHER = Divergence::TEACHER;

  const Task& task;
  const Divergence& divergence;
  const int64_t index;

  int64_t target = -1;  // entry of the row, or none
  float z_target = -INF;
  Softmax q, p;
  Shift shift;
  float nll = 0.0f, missing = 0.0f;  // of the target: -log q and 1 - q
  float elsewhere = 0.0f;            // what the target leaves to others
  float at_target = 0.0f;            // the nll's slope there

  __device__ __forceinline__ Row(const Task& task, const Divergence& divergence, int64_t index)
      : task(task), divergence(divergence), index(index) {}

  __device__ __forceinline__ void finish_softmax(const Tops& tops, const Sums& sums,
                                                 const Spread& spread) {
    if (spread.unknown) z_target = NAN;
    q = Softmax(tops.student, sums.others + expf(z_target - tops.student));
    if (task.rows.targets) {
      const Likelihood likelihood(tops.student, sums.others, z_target);
      nll = likelihood.nll, missing = likelihood.missing;
      elsewhere = task.smoothing + spread.mass;
      at_target = elsewhere - missing - task.uniform;
      if (task.smoothing != 0.0f) {
        const float mean = sums.logits / float(task.rows.V);
        nll = (1.0f - task.smoothing) * nll + task.smoothing * ((tops.student - mean) + q.log_sum);
      }
      if (z_target != -INF) nll += spread.terms;  // else infinite, or NaN
    }
    if constexpr (TEACHER) {
      p = Softmax(tops.teacher, sums.teacher);
      shift = divergence.shift(q.log(tops.student) - p.log(tops.teacher_at_peak));
    }
  }

  __device__ __forceinline__ ValueSlope measure(float z, float z_teacher) const {
    return divergence.at(p(z_teacher), q(z), q.log(z) - p.log(z_teacher), shift);
  }

  // The slope as a gradient: what the entry gets of the slopes of all.
  __device__ __forceinline__ float balanced(float slope, float z, float slope_sum) const {
    return slope - q(z) * slope_sum;
  }

  // The nll's slope at an entry that is not the target.
  __device__ __forceinline__ float nll_slope(float z, float mass) const {
    return (q(z) - mass) - task.uniform;
  }

  // dz of an entry; divergence_gradient: by z, where there is a teacher
  __device__ __forceinline__ float gradient(float z, bool is_target,
                                            float divergence_gradient) const {
    float g = 0.0f;
    if (!TEACHER || task.rows.targets)
      g = task.nll_weight * (is_target ? at_target : nll_slope(z, 0.0f));
    if constexpr (TEACHER) g += task.divergence_weight * divergence_gradient;
    return g * task.transform.slope(z);
  }

  // What no entry of dz exceeds, but for rounding. Balanced slopes are q - p.
  __device__ __forceinline__ float gradient_bound(const Measures& measures) const {
    float bound = task.rows.targets ? task.nll_weight * fmaxf(missing, elsewhere) : 0.0f;
    if constexpr (TEACHER)
      bound += task.divergence_weight * (Divergence::BALANCED
                                             ? fmaxf(p.inverse, q.inverse)
                                             : measures.steepest + fabsf(measures.slope));
    return bound * fabsf(task.transform.gain);
  }

  __device__ __forceinline__ float loss(const Measures& measures) const {
    return task.nll_weight * nll + task.divergence_weight * measures.value;
  }
};

}  // namespace softprompt_fast::cuda
