// The row kernels' door: plain C++ without CUDA or PyTorch types, so that each side
// compiles alone.
//
// Legend: C rows, V vocabulary, K more targets. p teacher, q student. Natural logarithms.
#pragma once

#include <cstdint>

namespace softprompt_fast::cuda {

enum class Dtype : int32_t { f32, bf16, f16 };

// Raw products W h of one head;
// z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature.
struct Logits {
  const float* raw;  // [C, V], 16-byte aligned; null: there is no such head
  int64_t stride;    // floats from row to row, a multiple of 8
  const void* bias;  // [V] in the head's dtype, or null
};

struct Rows {
  int64_t C;
  int32_t V;
  Dtype dtype;  // of the head: of bias and dz
  Logits student, teacher;
  const int64_t* targets;  // [C], or null
  // A target distribution with more entries than one, or null: masses[0] on a tail, masses[1 + k]
  // on more_targets[k] and the rest on the target. An entry whose mass is 0 is not looked at; no
  // entry comes twice.
  const int64_t* more_targets;  // [C, K]
  const float* masses;          // [C, 1 + K]
  int64_t K;
  const bool* keep;   // [C], or null; where false loss and dz are 0, whatever the row holds
  float* loss;        // [C]
  void* dz;           // [C, V] gradient by student.raw, which it may overwrite in place; or null
  int64_t dz_stride;  // entries from row to row
  float* unscale;     // [C], or null; what dz has to be multiplied by: a power of two
  double label_smoothing;
  double alpha;    // loss = alpha * divergence + (1 - alpha) * nll
  double beta;     // 0 KL(p||q), 1 KL(q||p), between JSD
  double softcap;  // 0: none
  double logit_scale;
  double temperature;
};

// Launched on the current device. Returns 0 or a cudaError_t.
int sparse_target_rows(const Rows& rows, void* stream);
int divergence_rows(const Rows& rows, void* stream);

const char* error_string(int error);

}  // namespace softprompt_fast::cuda
