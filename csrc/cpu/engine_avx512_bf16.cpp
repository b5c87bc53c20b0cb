// The engine for AVX-512 that multiplies in bf16 (AVX512-BF16).
#include "outside.h"

#if defined(__x86_64__)
#if !SPF_EMULATED
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")
#endif
#endif
#define SPF_VECTOR_BYTES 64
#define SPF_BF16 1

namespace softprompt_fast::avx512_bf16 {
#include "engine.h"
}  // namespace softprompt_fast::avx512_bf16

namespace softprompt_fast {
const Engine avx512_bf16_engine{"avx512_bf16", avx512_bf16::PANEL, avx512_bf16::LANES,
                                avx512_bf16::workspace_floats, avx512_bf16::run};
}  // namespace softprompt_fast
#if defined(__clang__) && !SPF_EMULATED
#pragma clang attribute pop
#endif
#endif  // __x86_64__
