// One call of the CPU engine in plain C++: every instruction set compiles it, without PyTorch.
//
// Legend: T tokens, D hidden width, V vocabulary. All matrices are dense and row-major.
#pragma once

#include <cstdint>
#include <functional>

namespace softprompt_fast {

enum class Dtype { f32, bf16, f16 };

// softmax(W h + b) of the student or of the teacher.
struct Head {
  const void* hidden;  // [T, D]
  const void* weight;  // [V, D]
  const void* bias;    // [V] or null
  int64_t D;
};

constexpr int PERIOD = 16;

struct TokenLoss {
  Head heads[2];  // student, teacher
  int streams;    // 1: student only, 2: both
  Dtype dtype;
  int64_t T, V;
  const int64_t* targets;  // [T] in range, or null
  float label_smoothing;
  // A target distribution with more entries than one: masses[0] on a tail, masses[1 + k] on
  // more_targets[k], what is left on the target. An entry without mass is not looked at.
  int64_t K;
  const int64_t* more_targets;  // [T, K] or null
  const float* masses;          // [T, 1 + K]

  double alpha;   // loss = alpha * divergence + (1 - alpha) * nll
  double beta;    // 0 KL(p||q), 1 KL(q||p), between JSD
  float softcap;  // 0: none
  float logit_scale;
  float temperature;
  int64_t rows;      // rows in a chunk, whole vectors of them
  int stored;        // so many of PERIOD blocks of the vocabulary keep their logits between sweeps
  int threads;       // as many work, each in scratch of its own
  float* loss;       // [T]
  float* dhidden;    // [T, D] or null
  float* workspace;  // workspace_floats()
};

// Runs tasks [0, tasks) on at most `threads` at once; each call knows which of them it is.
using Task = std::function<void(int64_t task, int thread)>;
using ParallelFor = void (*)(int64_t tasks, int threads, const Task&);

// Says that all of this memory will be written. Handing out small pages took a tenth of KL's time.
void expect_to_fill(void* first, int64_t bytes);

// What one instruction set offers.
struct Engine {
  const char* name;
  int panel_rows, vector_rows;  // rows of a tile at most, and at least
  int64_t (*workspace_floats)(const TokenLoss&);
  void (*run)(const TokenLoss&, ParallelFor);
};

extern const Engine amx_bf16_engine, avx512_bf16_engine, avx512_engine, avx2_engine,
    baseline_engine;

// In a smaller head than this, roundings of dz are too few to average out: backends/matmul.py.
constexpr int64_t LEAST_16_BIT = 64;

// What this machine multiplies a problem with. `bf16`: a head in bf16 that is not too small.
const Engine& engine(bool bf16);
inline const Engine& engine(const TokenLoss& p) {
  return engine(p.dtype == Dtype::bf16 && p.heads[0].D >= LEAST_16_BIT && p.V >= LEAST_16_BIT);
}

}  // namespace softprompt_fast
