// What the engine asks of the machine: its instruction set, its threads' memory.
#include <cstdlib>
#include <string_view>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "problem.h"

namespace softprompt_fast {
namespace {

// The widest that this CPU has, and that ATEN_CPU_CAPABILITY (PyTorch's variable) leaves it.
const Engine& widest_engine() {
#if defined(__x86_64__)
  const char* told = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = told ? told : "";
  const bool avx2 =
      most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && most != "avx2" && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) return avx512_engine;
  if (avx2) return avx2_engine;
#endif
  return baseline_engine;
}

}  // namespace

const Engine& engine() {
  static const Engine& chosen = widest_engine();
  return chosen;
}

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
