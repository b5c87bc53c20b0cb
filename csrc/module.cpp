// The module softprompt_fast._C: how it was built, and what the plan of a workspace asks. It needs
// no PyTorch; importing it registers the ops of the bindings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/problem.h"

namespace softprompt_fast {
namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"torch", SPF_OLDEST_TORCH " and later"},
      {"instruction_set", engine(false).name},
      {"instruction_set_bf16", engine(true).name},
#ifdef SPF_CUDA
      {"cuda", SPF_CUDA},  // the compiler and its targets
#else
      {"no_cuda", SPF_NO_CUDA},  // why not
#endif
  };
}

// The size of the workspace for T tokens in chunks of `rows`. teacher_width 0: no teacher.
int64_t workspace_floats(int64_t tokens, int64_t rows, int64_t width, int64_t teacher_width,
                         int64_t vocabulary, int stored, bool with_grad, Dtype dtype, int threads) {
  TokenLoss p{};
  float present;
  p.heads[0].D = width, p.heads[1].D = teacher_width;
  p.streams = teacher_width ? 2 : 1;
  p.dtype = dtype;
  p.T = tokens, p.V = vocabulary, p.rows = rows, p.stored = stored, p.threads = threads;
  p.dhidden = with_grad ? &present : nullptr;
  return engine(p).workspace_floats(p);
}

}  // namespace
}  // namespace softprompt_fast

PYBIND11_MODULE(_C, m) {
  using namespace softprompt_fast;
  m.def("build_info", &build_info,
        "How the extension was compiled, and the instruction set it uses on this CPU.");
  pybind11::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::f32)
      .value("bfloat16", Dtype::bf16)
      .value("float16", Dtype::f16);
  m.def("workspace_floats", &workspace_floats);
  // Emulated, bf16 has the wider vectors.
  m.attr("panel_rows") = engine(true).panel_rows;
  m.attr("vector_rows") = engine(true).vector_rows;
}
