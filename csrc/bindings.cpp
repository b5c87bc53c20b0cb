// The CPU engine as an op of softprompt_fast_C: checks, and pointers out of tensors.
#include "cpu/problem.h"
#include "tensors.h"

namespace softprompt_fast {
namespace {

void parallel_for(int64_t tasks, int threads, const Task& task) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t t = tasks * thread / threads; t < tasks * (thread + 1) / threads; t++)
        task(t, int(thread));
  });
}

const void* data_of(const Tensor& t, ScalarType dtype, Shape shape, const char* name) {
  SPF_CHECK(t.is_contiguous() && t.is_cpu() && t.scalar_type() == dtype && has_shape(t, shape),
            name, " must be a contiguous CPU tensor of shape ", listed(shape), " and dtype ", dtype,
            ": got ", listed(t.sizes()), " ", t.scalar_type());
  return t.const_data_ptr();
}

void token_loss_(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                 std::optional<double> softcap, double logit_scale, double temperature,
                 const MaybeTensor& targets, const MaybeTensor& more_targets,
                 const MaybeTensor& masses, std::optional<double> label_smoothing,
                 const MaybeTensor& teacher, const MaybeTensor& teacher_weight,
                 const MaybeTensor& teacher_bias, double beta, double alpha, int64_t rows,
                 int64_t stored, int64_t threads, const Tensor& loss, const Tensor& dhidden,
                 const Tensor& workspace) {
  TokenLoss p{};
  p.T = hidden.size(0), p.V = weight.size(0), p.dtype = dtype_of<Dtype>(hidden.scalar_type());
  p.streams = teacher ? 2 : 1;

  auto head = [&](const Tensor& h, const Tensor& w, const MaybeTensor& b) {
    const int64_t D = h.size(1);
    const ScalarType dtype = hidden.scalar_type();
    return Head{data_of(h, dtype, {p.T, D}, "hidden"), data_of(w, dtype, {p.V, D}, "weight"),
                b ? data_of(*b, dtype, {p.V}, "bias") : nullptr, D};
  };
  p.heads[0] = head(hidden, weight, bias);
  if (teacher)
    p.heads[1] = teacher_weight ? head(*teacher, *teacher_weight, teacher_bias)
                                : head(*teacher, weight, bias);
  if (targets)
    p.targets = static_cast<const int64_t*>(data_of(*targets, ScalarType::Long, {p.T}, "targets"));
  if (more_targets && masses) {
    p.K = more_targets->size(1);
    p.more_targets = static_cast<const int64_t*>(
        data_of(*more_targets, ScalarType::Long, {p.T, p.K}, "more_targets"));
    p.masses =
        static_cast<const float*>(data_of(*masses, ScalarType::Float, {p.T, 1 + p.K}, "masses"));
  }

  p.label_smoothing = float(label_smoothing.value_or(0)), p.alpha = alpha, p.beta = beta;
  p.softcap = float(softcap.value_or(0)), p.logit_scale = float(logit_scale),
  p.temperature = float(temperature);
  p.rows = rows, p.stored = int(stored), p.threads = int(threads);

  const bool with_grad = dhidden.size(0) == p.T;
  data_of(loss, ScalarType::Float, {p.T}, "loss");
  p.loss = loss.mutable_data_ptr<float>();
  if (with_grad) {
    data_of(dhidden, ScalarType::Float, {p.T, p.heads[0].D}, "dhidden");
    p.dhidden = dhidden.mutable_data_ptr<float>();
  }
  const Engine& engine = softprompt_fast::engine(p);
  SPF_CHECK(rows > 0 && rows % engine.vector_rows == 0, "rows must be a multiple of ",
            engine.vector_rows, ": got ", rows);
  SPF_CHECK(stored >= 0 && stored <= PERIOD, "stored must be in [0, ", PERIOD, "]: got ", stored);
  SPF_CHECK(threads > 0, "threads must be above 0: got ", threads);
  SPF_CHECK(workspace.is_contiguous() && workspace.scalar_type() == ScalarType::Float &&
                workspace.numel() >= engine.workspace_floats(p),
            "the workspace is too small");
  p.workspace = workspace.mutable_data_ptr<float>();
  engine.run(p, parallel_for);
}

STABLE_TORCH_LIBRARY(softprompt_fast_C, m) {
  m.def(
      "token_loss_(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, "
      "float logit_scale, float temperature, Tensor? targets, Tensor? more_targets, "
      "Tensor? masses, float? label_smoothing, Tensor? teacher, Tensor? teacher_weight, "
      "Tensor? teacher_bias, float beta, float alpha, int rows, int stored, int threads, "
      "Tensor(a!) loss, Tensor(b!) dhidden, Tensor(c!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(softprompt_fast_C, CPU, m) {
  m.impl("token_loss_", TORCH_BOX(&token_loss_));
}

}  // namespace
}  // namespace softprompt_fast
