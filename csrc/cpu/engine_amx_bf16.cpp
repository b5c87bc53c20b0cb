// The engine that multiplies in bf16 by AMX's tiles and does the rest by AVX-512.
#include "outside.h"

#if defined(__x86_64__)
#if !SPF_EMULATED
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")
#endif
#endif
#define SPF_VECTOR_BYTES 64
#define SPF_BF16 1
#define SPF_AMX 1

namespace softprompt_fast::amx_bf16 {
#include "engine.h"
}  // namespace softprompt_fast::amx_bf16

namespace softprompt_fast {
const Engine amx_bf16_engine{"amx_bf16", amx_bf16::PANEL, amx_bf16::LANES,
                             amx_bf16::workspace_floats, amx_bf16::run};
}  // namespace softprompt_fast
#if defined(__clang__) && !SPF_EMULATED
#pragma clang attribute pop
#endif
#endif  // __x86_64__
