// What a row's sweeps find out, in the form that over_row of reduce.cuh takes.
#pragma once

#include "formulas.cuh"

namespace softprompt_fast::cuda {

struct Tops {
  float student = -INF, teacher = -INF;  // largest logits
  int32_t peak = INT32_MAX;              // the student's first most probable entry
  float teacher_at_peak = -INF;

  SPF_DEVICE Tops combine(const Tops& a, const Tops& b) {
    Tops best = b.student > a.student || (b.student == a.student && b.peak < a.peak) ? b : a;
    best.teacher = fmaxf(a.teacher, b.teacher);
    return best;
  }
};

struct Sums {
  float others = 0.0f;   // of the student's e^(z - top), without the target's
  float teacher = 0.0f;  // of the teacher's e^(z - top)
  float logits = 0.0f;   // of the student's z, where labels are smoothed

  SPF_DEVICE Sums combine(const Sums& a, const Sums& b) {
    return {a.others + b.others, a.teacher + b.teacher, a.logits + b.logits};
  }
};

// What a target distribution has beside its target.
struct Spread {
  float mass = 0.0f;    // of the tail and of more targets
  float terms = 0.0f;   // what the cross-entropy has of them, all measured from the target's logit
  int32_t unknown = 0;  // how many of the more targets are no entries

  SPF_DEVICE Spread combine(const Spread& a, const Spread& b) {
    return {a.mass + b.mass, a.terms + b.terms, a.unknown + b.unknown};
  }
};

struct Measures {
  float value = 0.0f, slope = 0.0f;
  float steepest = 0.0f;  // largest |slope|

  __device__ __forceinline__ void add(const ValueSlope& f) {
    value += f.value, slope += f.slope;
    steepest = fmaxf(steepest, fabsf(f.slope));
  }
  SPF_DEVICE Measures combine(const Measures& a, const Measures& b) {
    return {a.value + b.value, a.slope + b.slope, fmaxf(a.steepest, b.steepest)};
  }
};

}  // namespace softprompt_fast::cuda
