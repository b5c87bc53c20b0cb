// The row kernel and its launchers: a plan for the device, an instance for divergence and dtype. No
// host synchronisation, nothing that a CUDA graph could not capture.
#include <cuda_runtime.h>

#include "worker.cuh"

namespace softprompt_fast::cuda {

template <class Divergence>
constexpr int most_threads =
    Divergence::TEACHER || Divergence::ENTRIES ? MAX_THREADS / 2 : MAX_THREADS;

template <class Divergence, class Head>
__global__ void __launch_bounds__(most_threads<Divergence>, 1)
    row_kernel(const __grid_constant__ Task task, const __grid_constant__ Divergence divergence) {
  __shared__ Exchange exchange;
  extern __shared__ float4 row_memory[];
  const int64_t row = blockIdx.x / cluster_size();
  Worker<Divergence, Head> worker(task, divergence, row, row_memory);
  if (task.rows.keep && !task.rows.keep[row])
    worker.clear();
  else
    worker.run(exchange);
}

namespace {

cudaError_t current_device(Device& device) {
  int id, value = 0;
  cudaError_t error = cudaGetDevice(&id);
  auto attribute = [&](cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, id);
    return value;
  };
  device.clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  device.block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.multiprocessor_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.reserved_bytes = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  return error;
}

template <class Kernel, class Divergence>
cudaError_t launch(Kernel kernel, const Task& task, const Divergence& divergence,
                   cudaStream_t stream) {
  const Plan& plan = task.plan;
  if (task.rows.C * plan.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(task.rows.C * plan.blocks));
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.blocks > 1;
  return cudaLaunchKernelEx(&config, kernel, task, divergence);
}

template <class Divergence>
int run(const Rows& rows, const Divergence& divergence, double alpha, void* stream) {
  if (rows.C == 0) return cudaSuccess;
  Device device;
  if (cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const int64_t entry_bytes = rows.K * sizeof(float);
  if (entry_bytes > device.block_bytes - int64_t(sizeof(Exchange))) return cudaErrorInvalidValue;
  const Task task{rows,
                  plan_rows(rows.V, Divergence::TEACHER ? 2 : 1, most_threads<Divergence>, device,
                            sizeof(Exchange), entry_bytes),
                  Transform(rows),
                  float(rows.label_smoothing),
                  float(rows.label_smoothing / rows.V),
                  float(1.0 - alpha),
                  float(alpha)};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (rows.dtype) {
    case Dtype::f32: return launch(row_kernel<Divergence, float>, task, divergence, on);
    case Dtype::bf16: return launch(row_kernel<Divergence, __nv_bfloat16>, task, divergence, on);
    case Dtype::f16: return launch(row_kernel<Divergence, __half>, task, divergence, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int sparse_target_rows(const Rows& rows, void* stream) {
  return rows.masses ? run(rows, SeveralTargets(), 0.0, stream)
                     : run(rows, OneTarget(), 0.0, stream);
}

int divergence_rows(const Rows& rows, void* stream) {
  if (rows.beta == 0.0) return run(rows, ForwardKL(), rows.alpha, stream);
  if (rows.beta == 1.0) return run(rows, ReverseKL(), rows.alpha, stream);
  return run(rows, JensenShannon(rows.beta), rows.alpha, stream);
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace softprompt_fast::cuda
