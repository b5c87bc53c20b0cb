// The compiled extension's door to Python: softprompt_fast_C::* ops and build_info().
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <map>
#include <optional>
#include <string>

#include "cpu/problem.h"

namespace softprompt_fast {
namespace {

using at::Tensor;

// For the widest instruction set that PyTorch found here, or was told of in ATEN_CPU_CAPABILITY.
const Engine& widest_engine() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512_engine;
  if (capability == "AVX2") return avx2_engine;
#endif
  return baseline_engine;
}

const Engine& engine() {
  static const Engine& chosen = widest_engine();
  return chosen;
}

void parallel_for(int64_t tasks, int threads, const Task& task) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t t = tasks * thread / threads; t < tasks * (thread + 1) / threads; t++)
        task(t, int(thread));
  });
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "softprompt_fast_C: unsupported dtype ", t.scalar_type());
  }
}

const void* data_of(const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape,
                    const char* name) {
  TORCH_CHECK(t.is_contiguous() && t.is_cpu() && t.scalar_type() == dtype && t.sizes() == shape,
              "softprompt_fast_C: ", name, " must be a contiguous CPU tensor of shape ", shape,
              " and dtype ", dtype, ": got ", t.sizes(), " ", t.scalar_type());
  return t.const_data_ptr();
}

int64_t panel_rows() { return engine().panel_rows; }
int64_t vector_rows() { return engine().vector_rows; }

// The size of the workspace for T tokens in chunks of `rows`. teacher_width 0: no teacher.
int64_t workspace_floats(int64_t tokens, int64_t rows, int64_t width, int64_t teacher_width,
                         int64_t vocabulary, int64_t stored, bool with_grad, bool converted,
                         int64_t threads) {
  TokenLoss p{};
  float present;
  p.heads[0].D = width, p.heads[1].D = teacher_width;
  p.streams = teacher_width ? 2 : 1;
  p.dtype = converted ? Dtype::bf16 : Dtype::f32;
  p.T = tokens, p.V = vocabulary, p.rows = rows, p.stored = int(stored), p.threads = int(threads);
  p.dhidden = with_grad ? &present : nullptr;
  return engine().workspace_floats(p);
}

using MaybeTensor = std::optional<Tensor>;

void token_loss_(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                 std::optional<double> softcap, double logit_scale, double temperature,
                 const MaybeTensor& targets, const MaybeTensor& more_targets,
                 const MaybeTensor& masses, std::optional<double> label_smoothing,
                 const MaybeTensor& teacher, const MaybeTensor& teacher_weight,
                 const MaybeTensor& teacher_bias, double beta, double alpha, int64_t rows,
                 int64_t stored, int64_t threads, const Tensor& loss, const Tensor& dhidden,
                 const Tensor& workspace) {
  TokenLoss p{};
  p.T = hidden.size(0), p.V = weight.size(0), p.dtype = dtype_of(hidden);
  p.streams = teacher ? 2 : 1;

  auto head = [&](const Tensor& h, const Tensor& w, const MaybeTensor& b) {
    const int64_t D = h.size(1);
    const at::ScalarType dtype = hidden.scalar_type();
    return Head{data_of(h, dtype, {p.T, D}, "hidden"), data_of(w, dtype, {p.V, D}, "weight"),
                b ? data_of(*b, dtype, {p.V}, "bias") : nullptr, D};
  };
  p.heads[0] = head(hidden, weight, bias);
  if (teacher)
    p.heads[1] = teacher_weight ? head(*teacher, *teacher_weight, teacher_bias)
                                : head(*teacher, weight, bias);
  if (targets)
    p.targets = static_cast<const int64_t*>(data_of(*targets, at::kLong, {p.T}, "targets"));
  if (more_targets && masses) {
    p.K = more_targets->size(1);
    p.more_targets =
        static_cast<const int64_t*>(data_of(*more_targets, at::kLong, {p.T, p.K}, "more_targets"));
    p.masses = static_cast<const float*>(data_of(*masses, at::kFloat, {p.T, 1 + p.K}, "masses"));
  }

  p.label_smoothing = float(label_smoothing.value_or(0)), p.alpha = alpha, p.beta = beta;
  p.softcap = float(softcap.value_or(0)), p.logit_scale = float(logit_scale),
  p.temperature = float(temperature);
  p.rows = rows, p.stored = int(stored), p.threads = int(threads);

  const bool with_grad = dhidden.size(0) == p.T;
  p.loss = (data_of(loss, at::kFloat, {p.T}, "loss"), loss.mutable_data_ptr<float>());
  if (with_grad) {
    data_of(dhidden, at::kFloat, {p.T, p.heads[0].D}, "dhidden");
    p.dhidden = dhidden.mutable_data_ptr<float>();
  }
  TORCH_CHECK(rows > 0 && rows % engine().vector_rows == 0,
              "softprompt_fast_C: rows must be a multiple of ", engine().vector_rows, ": got ",
              rows);
  TORCH_CHECK(stored >= 0 && stored <= PERIOD, "softprompt_fast_C: stored must be in [0, ", PERIOD,
              "]: got ", stored);
  TORCH_CHECK(threads > 0, "softprompt_fast_C: threads must be above 0: got ", threads);
  TORCH_CHECK(workspace.is_contiguous() && workspace.scalar_type() == at::kFloat &&
                  workspace.numel() >= engine().workspace_floats(p),
              "softprompt_fast_C: the workspace is too small");
  p.workspace = workspace.mutable_data_ptr<float>();
  engine().run(p, parallel_for);
}

TORCH_LIBRARY(softprompt_fast_C, m) {
  m.def("panel_rows() -> int", &panel_rows);
  m.def("vector_rows() -> int", &vector_rows);
  m.def(
      "workspace_floats(int tokens, int rows, int width, int teacher_width, int vocabulary, "
      "int stored, bool with_grad, bool converted, int threads) -> int",
      &workspace_floats);
  m.def(
      "token_loss_(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, "
      "float logit_scale, float temperature, Tensor? targets, Tensor? more_targets, "
      "Tensor? masses, float? label_smoothing, Tensor? teacher, Tensor? teacher_weight, "
      "Tensor? teacher_bias, float beta, float alpha, int rows, int stored, int threads, "
      "Tensor(a!) loss, Tensor(b!) dhidden, Tensor(c!) workspace) -> ()");
}

TORCH_LIBRARY_IMPL(softprompt_fast_C, CPU, m) { m.impl("token_loss_", &token_loss_); }

}  // namespace

void expect_to_fill([[maybe_unused]] void* first, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(first),
                  inner = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + bytes) / page * page;
  if (inner < end) madvise(reinterpret_cast<void*>(inner), end - inner, MADV_HUGEPAGE);
#endif
}

}  // namespace softprompt_fast

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", __VERSION__},
            {"torch", SPF_TORCH_VERSION},
            {"instruction_set", softprompt_fast::engine().name},
#ifdef SPF_CUDA
            {"cuda", SPF_CUDA},  // the compiler and its targets
#else
            {"no_cuda", SPF_NO_CUDA},  // why not
#endif
        };
      },
      "How the extension was compiled, and the instruction set it uses on this CPU.");
}
