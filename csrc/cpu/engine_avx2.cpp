// The engine for AVX2.
#include "outside.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SPF_VECTOR_BYTES 32

namespace softprompt_fast::avx2 {
#include "engine.h"
}  // namespace softprompt_fast::avx2

namespace softprompt_fast {
const Engine avx2_engine{"avx2", avx2::PANEL, avx2::LANES, avx2::workspace_floats, avx2::run};
}  // namespace softprompt_fast
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
