// A row of logits in, its loss and its gradient by the raw product out. A cluster of blocks works
// on a row, each on a slice that it holds in shared memory: a logit is read from device memory once
// and its gradient written once.
//
//   load      largest logits
//   softmax   sums of e^(z - top)
//   entries   of a target distribution with more than one
//   measure   sums of value and slope    (divergences that need them before the gradient)
//   gradient
//
// The gradient may overwrite the logits. What the blocks hold has been read by all of them before
// one writes: reductions lie between. A student's row that is not held belongs to a single block,
// which goes on in ascending order: the gradient of the entries below v takes no byte of the logits
// from v on.
#pragma once

#include <type_traits>

#include "reduce.cuh"
#include "row.cuh"
#include "stream.cuh"

namespace softprompt_fast::cuda {

// What a block does for its row. Head: the dtype of bias and gradient.
template <class Divergence, class Head>
struct Worker {
  static constexpr bool TEACHER = Divergence::TEACHER, ENTRIES = Divergence::ENTRIES;
  static constexpr bool MEASURED_LATE = Divergence::BALANCED;  // where there is a gradient: with it
  static constexpr bool FP16 = std::is_same<Head, __half>::value;

  const Task& task;
  const int first, count, octets;  // of the slice
  const Stream<Head> student, teacher;
  float* const z_more;  // [K], of the entries in the slice
  Row<Divergence> row;

  __device__ __forceinline__ Worker(const Task& task, const Divergence& divergence, int64_t index,
                                    float4* memory)
      : task(task), first(min(block_in_cluster() * task.plan.slice * OCTET, task.rows.V)),
        count(min(task.plan.slice * OCTET, task.rows.V - first)),
        octets((count + OCTET - 1) / OCTET),
        student(task.rows.student, index, first, count, task.plan.held[0], memory, task.transform),
        teacher(task.rows.teacher, index, first, count, task.plan.held[1],
                memory + 2 * task.plan.held[0], task.transform),
        z_more(reinterpret_cast<float*>(memory + 2 * (task.plan.held[0] + task.plan.held[1]))),
        row(task, divergence, index) {}

  __device__ __forceinline__ void run(Exchange& exchange) {
    fetch();
    cluster_sync();  // all blocks have started: their shared memory may be written
    const Tops tops = over_row<0>(load(), exchange);
    const Sums sums = over_row<1>(softmax(tops), exchange);
    Spread spread;
    if constexpr (ENTRIES) spread = over_row<2>(entries(), exchange);
    row.finish_softmax(tops, sums, spread);

    const bool with_grad = task.rows.dz != nullptr;
    Measures measures;
    if constexpr (TEACHER)
      if (!(MEASURED_LATE && with_grad)) measures = over_row<2>(measure(), exchange);
    if (with_grad) {
      const float lift = choose_lift(measures);
      const Measures late = gradient(measures.slope, lift);
      if constexpr (MEASURED_LATE) {
        measures = over_row<2>(late, exchange);
        balance(tops, measures.slope, lift);
      }
      if constexpr (ENTRIES) overwrite_entries(lift);
    }
    if (is_leader()) task.rows.loss[row.index] = row.loss(measures);
  }

  // A row that does not count.
  __device__ __forceinline__ void clear() const {
    if (task.rows.dz)
      for (int o = threadIdx.x; o < octets; o += blockDim.x)
        store_octet(dz() + o * OCTET, Octet{}, count - o * OCTET);
    if (!is_leader()) return;
    task.rows.loss[row.index] = 0.0f;
    if (task.rows.unscale) task.rows.unscale[row.index] = 1.0f;
  }

 private:
  __device__ __forceinline__ bool is_leader() const { return first == 0 && threadIdx.x == 0; }

  // Where the slice's gradient begins.
  __device__ __forceinline__ Head* dz() const {
    return static_cast<Head*>(task.rows.dz) + row.index * task.rows.dz_stride + first;
  }

  // A target that is no entry makes its row NaN.
  __device__ __forceinline__ void fetch() {
    student.fetch();
    if constexpr (TEACHER) teacher.fetch();
    if (task.rows.targets) {
      row.target = task.rows.targets[row.index];
      const bool inside = row.target >= 0 && row.target < task.rows.V;
      row.z_target = inside ? Stream<Head>::entry(task.rows.student, row.index, int(row.target),
                                                  task.transform)
                            : NAN;
    }
    __pipeline_wait_prior(0);
  }

  // Calls with (k, id, mass) for those of more targets that are the slice's and this thread's. id
  // -1: no entry.
  template <class Visit>
  __device__ __forceinline__ void for_entries(Visit visit) const {
    const int K = int(task.rows.K);
#pragma unroll 1  // few rounds, and registers that the sweeps need
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
      const float mass = task.rows.masses[row.index * (1 + K) + 1 + k];
      const int64_t id = task.rows.more_targets[row.index * K + k];
      // what is no entry, or has no mass, is the first block's
      const bool is_entry = mass > 0.0f && id >= 0 && id < task.rows.V;
      if (is_entry ? id >= first && id < first + count : first == 0)
        visit(k, is_entry ? int(id) : -1, mass);
    }
  }

  // Their logits are read before a gradient may lie over them, and kept.
  __device__ __forceinline__ Spread entries() const {
    Spread spread;
    if (is_leader()) {
      spread.mass = task.rows.masses[row.index * (1 + task.rows.K)];
      spread.terms = spread.mass * row.z_target;
    }
    for_entries([&](int k, int id, float mass) {
      spread.mass += mass;
      spread.unknown += id < 0 && mass > 0.0f;
      if (id < 0) return;
      z_more[k] = Stream<Head>::entry(task.rows.student, row.index, id, task.transform);
      spread.terms -= mass * (z_more[k] - row.z_target);
    });
    return spread;
  }

  // q - t of the entries with mass, before it is rounded.
  __device__ __forceinline__ void overwrite_entries(float lift) const {
    __syncthreads();
    for_entries([&](int k, int id, float mass) {
      if (id < 0) return;
      const float g =
          task.nll_weight * row.nll_slope(z_more[k], mass) * task.transform.slope(z_more[k]);
      dz()[id - first] = Head(FP16 ? g * lift : g);
    });
  }

  __device__ __forceinline__ Tops load() const {
    Tops tops;
    for (int o = threadIdx.x; o < octets; o += blockDim.x) {
      const Octet z = student.first(o);
      const float top = z.largest();
      if constexpr (TEACHER) {
        const Octet z_teacher = teacher.first(o);
        tops.teacher = fmaxf(tops.teacher, z_teacher.largest());
        if (top > tops.student) {
#pragma unroll
          for (int i = OCTET - 1; i >= 0; i--)
            if (z[i] == top) tops.peak = first + o * OCTET + i, tops.teacher_at_peak = z_teacher[i];
        }
      }
      tops.student = fmaxf(tops.student, top);
    }
    return tops;
  }

  // Where in an octet the target is; outside [0, OCTET) where it is elsewhere.
  __device__ __forceinline__ int target_in(int o) const {
    return int(row.target) - first - o * OCTET;
  }

  // The target is left out of the sum, so that 1 - q of the target never has to be a difference.
  __device__ __forceinline__ Sums softmax(const Tops& tops) const {
    Sums sums;
    for (int o = threadIdx.x; o < octets; o += blockDim.x) {
      const Octet z = student.again(o);
      const int target = target_in(o);
#pragma unroll
      for (int i = 0; i < OCTET; i++) sums.others += i == target ? 0.0f : expf(z[i] - tops.student);
      if (task.smoothing != 0.0f) {
#pragma unroll
        for (int i = 0; i < OCTET; i++) sums.logits += o * OCTET + i < count ? z[i] : 0.0f;
      }
      if constexpr (TEACHER) {
        const Octet z_teacher = teacher.again(o);
#pragma unroll
        for (int i = 0; i < OCTET; i++) sums.teacher += expf(z_teacher[i] - tops.teacher);
      }
    }
    return sums;
  }

  __device__ __forceinline__ Measures measure() const {
    Measures measures;
    for (int o = threadIdx.x; o < octets; o += blockDim.x) {
      const Octet z = student.again(o), z_teacher = teacher.again(o);
#pragma unroll
      for (int i = 0; i < OCTET; i++) measures.add(row.measure(z[i], z_teacher[i]));
    }
    return measures;
  }

  // What the gradient is multiplied by on its way out: a power of two, 1 but for fp16.
  __device__ __forceinline__ float choose_lift(const Measures& measures) const {
    if (!FP16 || !task.rows.unscale) return 1.0f;
    const float lift = lift_to_fp16(row.gradient_bound(measures));
    if (is_leader()) task.rows.unscale[row.index] = 1.0f / lift;
    return lift;
  }

  __device__ __forceinline__ Measures gradient(float slope_sum, float lift) const {
    Measures measures;
    for (int start = 0; start < octets; start += blockDim.x) {
      const int o = start + threadIdx.x;
      Octet z{}, z_teacher{};
      if (o < octets) z = student.again(o);
      // before the first of these logits is overwritten
      if (student.held < octets) __syncthreads();
      if (o >= octets) break;
      if constexpr (TEACHER) z_teacher = teacher.again(o);
      const int target = target_in(o);
#pragma unroll
      for (int i = 0; i < OCTET; i++) {
        float slope = 0.0f;
        if constexpr (TEACHER) {
          const ValueSlope f = row.measure(z[i], z_teacher[i]);
          if (MEASURED_LATE) measures.add(f);
          slope = MEASURED_LATE ? f.slope : row.balanced(f.slope, z[i], slope_sum);
        }
        const float g = row.gradient(z[i], i == target, slope);
        z[i] = FP16 ? g * lift : g;
      }
      store_octet(dz() + o * OCTET, z, count - o * OCTET);
    }
    return measures;
  }

  // What rounding left of slopes that should sum to zero is known only now: it is taken off at the
  // student's largest q, which is most of it in a confident row.
  __device__ __forceinline__ void balance(const Tops& tops, float slope_sum, float lift) const {
    const int at = tops.peak - first;
    if (at < 0 || at >= count || threadIdx.x != 0) return;
    const float z = tops.student;
    const float slope = row.balanced(row.measure(z, tops.teacher_at_peak).slope, z, slope_sum);
    const float g = row.gradient(z, tops.peak == row.target, slope);
    dz()[at] = Head(FP16 ? g * lift : g);
  }
};

}  // namespace softprompt_fast::cuda
