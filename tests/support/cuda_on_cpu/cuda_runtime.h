// Just enough CUDA for g++ to compile csrc/cuda/rows.cu and to run it on a CPU, in fibers.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __CUDA_ARCH__ 900

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
using std::max;
using std::min;

// ---- barriers and shuffles

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::wait(emulation::Scope::block, line);
}

inline int __shfl_xor_sync(unsigned, int value, int mask, int line = __builtin_LINE()) {
  emulation::Fiber& fiber = *emulation::block->now;
  const int parity = fiber.shuffles++ % 2;  // a lane may be one shuffle ahead of another
  fiber.posted[parity] = value;
  emulation::wait(emulation::Scope::warp, line);
  return emulation::block->fibers[threadIdx.x ^ mask].posted[parity];
}

// ---- asynchronous copies: they happen when they are waited for, at the latest moment allowed

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) abort();
  emulation::block->now->copies.push_back([=] { memcpy(to, from, bytes); });
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  for (auto& copy : emulation::block->now->copies) copy();
  emulation::block->now->copies.clear();
}

// ---- the runtime

// What a test may choose.
struct Settings {
  int major = 9, block_bytes = 232448, multiprocessor_bytes = 233472, reserved_bytes = 1024;
};
inline Settings settings;
inline std::string last_error;

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorUnknown = 999
};
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100, cudaLaunchAttributeClusterDimension = 4;
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* id) { return *id = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const Settings& s = settings;
  const int values[] = {s.major, s.block_bytes, s.multiprocessor_bytes, s.reserved_bytes};
  return *value = values[name], cudaSuccess;
}
inline thread_local size_t allowed_shared = 49152;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute name, int value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  allowed_shared = std::max(value, 49152);
  return value <= settings.block_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
inline const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...),
                               const Given&... given) {
  const int blocks = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  const bool possible = config->gridDim.x > 0 && config->gridDim.x % blocks == 0 &&
                        config->blockDim.x % 32 == 0 &&
                        config->dynamicSmemBytes <= allowed_shared && blocks <= 8 &&
                        (settings.major >= 9 || blocks == 1);
  last_error = "invalid launch";
  if (!possible) return cudaErrorInvalidConfiguration;
  try {
    emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, blocks,
                        [&] { kernel(given...); });
  } catch (const std::exception& error) {
    last_error = error.what();
    return cudaErrorUnknown;
  }
  return cudaSuccess;
}
