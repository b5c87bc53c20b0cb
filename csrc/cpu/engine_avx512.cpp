// The engine for AVX-512.
#include "outside.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif
#define SPF_VECTOR_BYTES 64

namespace softprompt_fast::avx512 {
#include "engine.h"
}  // namespace softprompt_fast::avx512

namespace softprompt_fast {
const Engine avx512_engine{"avx512", avx512::PANEL, avx512::LANES, avx512::workspace_floats,
                           avx512::run};
}  // namespace softprompt_fast
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
