// What the engine asks of the machine: its instruction set, its threads' memory.
#include <cstdlib>
#include <string_view>
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "problem.h"

namespace softprompt_fast {
namespace {

#if defined(__x86_64__) && !SPF_EMULATED
// AMX's tiles: the CPU has them, and the system lends them to this process.
bool tiles_are_lent() {
#if defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // leaf 7, edx
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & AMX_BF16) && (edx & AMX_TILE) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

// The widest that this CPU has, and that ATEN_CPU_CAPABILITY (PyTorch's variable) leaves it.
const Engine& widest_engine(bool bf16) {
  const char* told = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = told ? told : "";
  const bool avx2 =
      most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && most != "avx2" && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (bf16 && avx512 && __builtin_cpu_supports("avx512bf16"))
    return tiles_are_lent() ? amx_bf16_engine : avx512_bf16_engine;
  if (avx512) return avx512_engine;
  if (avx2) return avx2_engine;
  return baseline_engine;
}
#elif SPF_EMULATED
// For the tests, on any CPU: the products in bf16 of the engine that this variable names.
const Engine& widest_engine(bool bf16) {
  const char* name = std::getenv("SPF_EMULATED_ENGINE");
  if (!bf16) return avx2_engine;
  return name && name == std::string_view(amx_bf16_engine.name) ? amx_bf16_engine
                                                                : avx512_bf16_engine;
}
#else
const Engine& widest_engine(bool) { return baseline_engine; }
#endif

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
