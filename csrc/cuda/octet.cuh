// Eight entries of the vocabulary: what a thread loads and stores at once. fp32 takes two 16-byte
// accesses, a 16-bit dtype one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "formulas.cuh"
#include "plan.h"

namespace softprompt_fast::cuda {

struct Octet {
  float v[OCTET];

  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
  __device__ __forceinline__ float largest() const {
    return fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])),
                 fmaxf(fmaxf(v[4], v[5]), fmaxf(v[6], v[7])));
  }
};

SPF_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The first `count` entries from p; zeros beyond.
template <class T>
SPF_DEVICE Octet load_octet(const T* p, int count) {
  T values[OCTET];
  if (count >= OCTET && aligned(p)) {
#pragma unroll
    for (int part = 0; part < int(sizeof values / 16); part++) {
      const uint4 bits = reinterpret_cast<const uint4*>(p)[part];
      memcpy(reinterpret_cast<char*>(values) + 16 * part, &bits, 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < OCTET; i++) values[i] = i < count ? p[i] : T(0.0f);
  }
  Octet x;
#pragma unroll
  for (int i = 0; i < OCTET; i++) x[i] = static_cast<float>(values[i]);
  return x;
}

SPF_DEVICE void narrow(const Octet& x, float* out) { memcpy(out, x.v, sizeof x.v); }
SPF_DEVICE void narrow(const Octet& x, __nv_bfloat16* out) {
#pragma unroll
  for (int i = 0; i < OCTET; i += 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
    memcpy(out + i, &pair, sizeof pair);
  }
}
SPF_DEVICE void narrow(const Octet& x, __half* out) {
#pragma unroll
  for (int i = 0; i < OCTET; i += 2) {
    const __half2 pair = __floats2half2_rn(x[i], x[i + 1]);
    memcpy(out + i, &pair, sizeof pair);
  }
}

// The first `count` entries to p, rounded to its dtype.
template <class T>
SPF_DEVICE void store_octet(T* p, const Octet& x, int count) {
  T values[OCTET];
  narrow(x, values);
  if (count >= OCTET && aligned(p)) {
#pragma unroll
    for (int part = 0; part < int(sizeof values / 16); part++) {
      uint4 bits;
      memcpy(&bits, reinterpret_cast<const char*>(values) + 16 * part, 16);
      reinterpret_cast<uint4*>(p)[part] = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < OCTET; i++)
      if (i < count) p[i] = values[i];
  }
}

}  // namespace softprompt_fast::cuda
