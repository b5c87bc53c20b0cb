// The engine for any CPU: 16-byte vectors (SSE2, NEON).
#include "outside.h"

#define SPF_VECTOR_BYTES 16

namespace softprompt_fast::baseline {
#include "engine.h"
}  // namespace softprompt_fast::baseline

namespace softprompt_fast {
const Engine baseline_engine{"baseline", baseline::PANEL, baseline::LANES,
                             baseline::workspace_floats, baseline::run};
}  // namespace softprompt_fast
