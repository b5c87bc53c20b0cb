// What the engine asks of the machine: its instruction set, its threads' memory.
#include <cstdlib>
#include <string_view>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "problem.h"

namespace softprompt_fast {
namespace {

// SPF_EMULATED: for the tests, the products in bf16 on any CPU.
#if SPF_EMULATED
constexpr bool emulated = true;
#else
constexpr bool emulated = false;
#endif

// The widest that this CPU has, and that ATEN_CPU_CAPABILITY (PyTorch's variable) leaves it.
const Engine& widest_engine(bool bf16) {
#if defined(__x86_64__)
  const char* told = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = told ? told : "";
  const bool avx2 =
      most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && most != "avx2" && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (bf16 && (emulated || (avx512 && __builtin_cpu_supports("avx512bf16"))))
    return avx512_bf16_engine;
  if (avx512) return avx512_engine;
  if (avx2) return avx2_engine;
#endif
  return baseline_engine;
}

}  // namespace

const Engine& engine(bool bf16) {
  static const Engine &fp32_products = widest_engine(false), &bf16_products = widest_engine(true);
  return bf16 ? bf16_products : fp32_products;
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
