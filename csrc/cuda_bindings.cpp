// The row kernels of csrc/cuda as ops of softprompt_fast_C: checks, and pointers out of tensors.
// The stream comes as a number, so that no CUDA header is needed; the caller has made its device
// the current one.
//
// Legend: C rows, V vocabulary, K more targets.
#include <utility>

#include "cuda/rows.h"
#include "tensors.h"

namespace softprompt_fast {
namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(softprompt_fast_C, m) {
  m.def(
      "sparse_target_rows_(Tensor(a!) logits, Tensor targets, Tensor? more_targets, "
      "Tensor? masses, float? label_smoothing, Tensor? bias, float? softcap, float logit_scale, "
      "float temperature, Tensor? keep, Tensor(b!) loss, Tensor(c!)? dz, Tensor(d!)? unscale, "
      "int stream) -> ()");
  m.def(
      "divergence_rows_(Tensor(a!) logits, Tensor teacher_logits, float beta, Tensor? targets, "
      "Tensor? more_targets, Tensor? masses, float? label_smoothing, float alpha, Tensor? bias, "
      "Tensor? teacher_bias, float? softcap, float logit_scale, float temperature, Tensor? keep, "
      "Tensor(b!) loss, Tensor(c!)? dz, Tensor(d!)? unscale, int stream) -> ()");
}

#ifdef SPF_CUDA

constexpr int64_t MAX_VOCABULARY = int64_t(1) << 30;

// The shape that all tensors of a call share.
struct Chunk {
  torch::stable::Device device;
  int64_t C, V;
  ScalarType head;  // dtype of bias and dz

  Chunk(const Tensor& logits, const MaybeTensor& bias, const MaybeTensor& dz)
      : device(logits.device()), C(logits.size(0)), V(logits.size(1)),
        head(dz     ? dz->scalar_type()
             : bias ? bias->scalar_type()
                    : ScalarType::Float) {
    SPF_CHECK(V > 0 && V <= MAX_VOCABULARY, "the vocabulary has to have 1 to ", MAX_VOCABULARY,
              " entries: got ", V);
  }

  void check(const Tensor& t, ScalarType dtype, Shape shape, const char* name) const {
    const bool here = t.device() == device;
    SPF_CHECK(here && t.scalar_type() == dtype && has_shape(t, shape), name,
              " must be a tensor of shape ", listed(shape), " and dtype ", dtype,
              " on the logits' device: got ", listed(t.sizes()), " ", t.scalar_type(),
              here ? "" : " on another device");
  }

  void check_rows(const Tensor& t, ScalarType dtype, const char* name) const {
    check(t, dtype, {C, V}, name);
    SPF_CHECK((V == 1 || t.stride(1) == 1) && (C <= 1 || t.stride(0) >= V), "the rows of ", name,
              " must lie one after the other: got strides ", listed(t.strides()));
  }

  // Where the numbers of an optional contiguous tensor begin.
  template <class T>
  T* data(const MaybeTensor& t, ScalarType dtype, Shape shape, const char* name) const {
    if (!t) return nullptr;
    check(*t, dtype, shape, name);
    SPF_CHECK(t->is_contiguous(), name, " must be contiguous");
    return static_cast<T*>(t->data_ptr());
  }

  cuda::Logits logits(const Tensor& raw, const MaybeTensor& bias, const char* name) const {
    check_rows(raw, ScalarType::Float, name);
    const auto* begin = static_cast<const float*>(raw.const_data_ptr());
    SPF_CHECK(reinterpret_cast<uintptr_t>(begin) % 16 == 0 && (C <= 1 || raw.stride(0) % 8 == 0),
              "rows of ", name, " must begin at multiples of 16 bytes and be a multiple of 8 ",
              "entries apart: got strides ", listed(raw.strides()));
    return {begin, raw.stride(0), data<const void>(bias, head, {V}, "bias")};
  }

  // dz lies apart from the logits, or its rows begin where theirs do.
  void check_overlap(const Tensor& dz, const Tensor& raw) const {
    auto bounds = [this](const Tensor& t) {
      const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      return std::pair(begin, begin + ((C - 1) * t.stride(0) + V) * t.element_size());
    };
    const auto [dz_begin, dz_end] = bounds(dz);
    const auto [begin, end] = bounds(raw);
    if (C == 0 || dz_end <= begin || end <= dz_begin) return;
    const bool same_rows =
        C == 1 || dz.stride(0) * dz.element_size() == raw.stride(0) * raw.element_size();
    SPF_CHECK(dz_begin == begin && same_rows,
              "dz overlaps the logits, but its rows do not begin where theirs do");
  }
};

cuda::Rows rows_of(const Chunk& chunk, const Tensor& logits, const MaybeTensor& targets,
                   const MaybeTensor& more_targets, const MaybeTensor& masses,
                   std::optional<double> label_smoothing, const MaybeTensor& bias,
                   std::optional<double> softcap, double logit_scale, double temperature,
                   const MaybeTensor& keep, const Tensor& loss, const MaybeTensor& dz,
                   const MaybeTensor& unscale) {
  cuda::Rows rows{};
  rows.C = chunk.C, rows.V = int32_t(chunk.V), rows.dtype = dtype_of<cuda::Dtype>(chunk.head);
  rows.student = chunk.logits(logits, bias, "logits");
  rows.targets = chunk.data<const int64_t>(targets, ScalarType::Long, {chunk.C}, "targets");
  SPF_CHECK(more_targets.has_value() == masses.has_value(), "masses go with more_targets");
  if (more_targets) {
    rows.K = more_targets->size(-1);
    rows.more_targets = chunk.data<const int64_t>(more_targets, ScalarType::Long, {chunk.C, rows.K},
                                                  "more_targets");
    rows.masses =
        chunk.data<const float>(masses, ScalarType::Float, {chunk.C, 1 + rows.K}, "masses");
  }
  rows.keep = chunk.data<const bool>(keep, ScalarType::Bool, {chunk.C}, "keep");
  rows.loss = chunk.data<float>(loss, ScalarType::Float, {chunk.C}, "loss");
  if (dz) {
    chunk.check_rows(*dz, chunk.head, "dz");
    chunk.check_overlap(*dz, logits);
    rows.dz = dz->data_ptr(), rows.dz_stride = dz->stride(0);
  }
  SPF_CHECK(!unscale || (dz && chunk.head == ScalarType::Half), "unscale goes with a dz in fp16");
  rows.unscale = chunk.data<float>(unscale, ScalarType::Float, {chunk.C}, "unscale");
  rows.label_smoothing = label_smoothing.value_or(0);
  rows.softcap = softcap.value_or(0), rows.logit_scale = logit_scale,
  rows.temperature = temperature;
  return rows;
}

void launched(int error, const char* kernel) {
  SPF_CHECK(error == 0, kernel, " could not be launched: ", cuda::error_string(error));
}

void sparse_target_rows_(const Tensor& logits, const Tensor& targets,
                         const MaybeTensor& more_targets, const MaybeTensor& masses,
                         std::optional<double> label_smoothing, const MaybeTensor& bias,
                         std::optional<double> softcap, double logit_scale, double temperature,
                         const MaybeTensor& keep, const Tensor& loss, const MaybeTensor& dz,
                         const MaybeTensor& unscale, int64_t stream) {
  const Chunk chunk(logits, bias, dz);
  const cuda::Rows rows = rows_of(chunk, logits, targets, more_targets, masses, label_smoothing,
                                  bias, softcap, logit_scale, temperature, keep, loss, dz, unscale);
  launched(cuda::sparse_target_rows(rows, reinterpret_cast<void*>(stream)), "sparse_target_rows");
}

void divergence_rows_(const Tensor& logits, const Tensor& teacher_logits, double beta,
                      const MaybeTensor& targets, const MaybeTensor& more_targets,
                      const MaybeTensor& masses, std::optional<double> label_smoothing,
                      double alpha, const MaybeTensor& bias, const MaybeTensor& teacher_bias,
                      std::optional<double> softcap, double logit_scale, double temperature,
                      const MaybeTensor& keep, const Tensor& loss, const MaybeTensor& dz,
                      const MaybeTensor& unscale, int64_t stream) {
  SPF_CHECK(!more_targets, "beside a teacher a target has one entry");
  const Chunk chunk(logits, bias ? bias : teacher_bias, dz);
  cuda::Rows rows = rows_of(chunk, logits, targets, more_targets, masses, label_smoothing, bias,
                            softcap, logit_scale, temperature, keep, loss, dz, unscale);
  rows.teacher = chunk.logits(teacher_logits, teacher_bias, "teacher_logits");
  rows.beta = beta, rows.alpha = alpha;
  launched(cuda::divergence_rows(rows, reinterpret_cast<void*>(stream)), "divergence_rows");
}

STABLE_TORCH_LIBRARY_IMPL(softprompt_fast_C, CUDA, m) {
  m.impl("sparse_target_rows_", TORCH_BOX(&sparse_target_rows_));
  m.impl("divergence_rows_", TORCH_BOX(&divergence_rows_));
}

#endif  // SPF_CUDA

}  // namespace
}  // namespace softprompt_fast
