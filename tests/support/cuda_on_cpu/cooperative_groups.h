// The cluster of blocks; see cuda_runtime.h beside this.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emulation::block->cluster->blocks; }
  unsigned block_rank() const { return emulation::block->rank; }
  void sync(int line = __builtin_LINE()) const { emulation::wait(emulation::Scope::cluster, line); }

  // thread_local variables lie equally far from each other in every thread
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    const auto& shared = emulation::block->cluster->shared;
    return reinterpret_cast<T*>(reinterpret_cast<char*>(mine) - shared[emulation::block->rank] +
                                shared[rank]);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
