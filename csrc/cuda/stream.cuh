// A block's slice of a row of logits: what of it is held in shared memory, and where the rest lies.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "octet.cuh"

namespace softprompt_fast::cuda {

// An octet is always the same thread's, so that reading what is held takes no barrier.
template <class Head>
struct Stream {
  const float* raw;    // of the slice
  const Head* bias;    // of the slice, or null
  int count;           // entries of the slice
  int held;            // octets in shared memory
  float4 *low, *high;  // [held] each, their first and second halves: no two lanes meet in a bank
  Transform transform;

  // memory: room for two float4 an octet
  __device__ __forceinline__ Stream(const Logits& logits, int64_t row, int first, int count,
                                    int held, float4* memory, const Transform& transform)
      : raw(logits.raw + row * logits.stride + first),
        bias(logits.bias ? static_cast<const Head*>(logits.bias) + first : nullptr), count(count),
        held(held), low(memory), high(memory + held), transform(transform) {}

  // Sends the raw products that will be held on their way.
  __device__ __forceinline__ void fetch() const {
    for (int o = threadIdx.x; o < held && o * OCTET < count; o += blockDim.x) {
      const float* from = raw + o * OCTET;
      if (count - o * OCTET >= OCTET) {
        __pipeline_memcpy_async(low + o, from, 16);
        __pipeline_memcpy_async(high + o, from + OCTET / 2, 16);
      } else {
        hold(o, load_octet(from, count - o * OCTET));
      }
    }
    __pipeline_commit();
  }

  // z of an octet when it is first read, after __pipeline_wait_prior.
  __device__ __forceinline__ Octet first(int o) const {
    if (o >= held) return read(o);
    const Octet z = finish(o, of_memory(o));
    hold(o, z);
    return z;
  }

  // z of an octet later on.
  __device__ __forceinline__ Octet again(int o) const { return o < held ? of_memory(o) : read(o); }

  // z of one entry of the row.
  SPF_DEVICE float entry(const Logits& logits, int64_t row, int v, const Transform& transform) {
    float x = logits.raw[row * logits.stride + v];
    if (logits.bias) x += static_cast<float>(static_cast<const Head*>(logits.bias)[v]);
    return transform.z(x);
  }

 private:
  __device__ __forceinline__ Octet of_memory(int o) const {
    const float4 a = low[o], b = high[o];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }

  __device__ __forceinline__ void hold(int o, const Octet& x) const {
    low[o] = make_float4(x[0], x[1], x[2], x[3]);
    high[o] = make_float4(x[4], x[5], x[6], x[7]);
  }

  __device__ __forceinline__ Octet read(int o) const {
    return finish(o, load_octet(raw + o * OCTET, count - o * OCTET));
  }

  // -inf beyond the vocabulary: no probability, never a maximum
  __device__ __forceinline__ Octet finish(int o, Octet x) const {
    const int left = count - o * OCTET;
    if (bias) {
      const Octet b = load_octet(bias + o * OCTET, left);
#pragma unroll
      for (int i = 0; i < OCTET; i++) x[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < OCTET; i++) x[i] = i < left ? transform.z(x[i]) : -INF;
    return x;
  }
};

}  // namespace softprompt_fast::cuda
