// Tensors as the bindings see them: through PyTorch's stable ABI only, so that one build runs with
// every PyTorch from the oldest allowed one (setup.py) on.
#pragma once

// Not for all files: with it, the pybind11 in PyTorch 2.10's headers refuses to be included.
#define TORCH_TARGET_VERSION SPF_TORCH_TARGET_VERSION
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace softprompt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

#define SPF_CHECK(condition, ...) STD_TORCH_CHECK(condition, "softprompt_fast_C: ", __VA_ARGS__)

template <class Numbers>
std::string listed(const Numbers& numbers) {
  std::ostringstream out;
  for (const int64_t n : numbers) out << (out.tellp() ? ", " : "[") << n;
  return out.tellp() ? out.str() + "]" : "[]";
}

inline bool has_shape(const Tensor& t, Shape shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

// The right one of an engine's dtypes, which all have the same names.
template <class Dtype>
Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: SPF_CHECK(false, "unsupported dtype ", dtype);
  }
}

}  // namespace softprompt_fast
