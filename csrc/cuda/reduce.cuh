// One number a row from all threads of all blocks that work on it: over the warp, the block, the
// cluster, each in a fixed order. Every thread gets the same bits.
#pragma once

#include <cooperative_groups.h>

#include <cstring>

#include "formulas.cuh"
#include "plan.h"

namespace softprompt_fast::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
SPF_DEVICE int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
SPF_DEVICE int block_in_cluster() { return cooperative_groups::this_cluster().block_rank(); }
SPF_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <class T>
SPF_DEVICE T* of_block(T* shared, int block) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, block);
}
#else  // no clusters: a block is alone
SPF_DEVICE int cluster_size() { return 1; }
SPF_DEVICE int block_in_cluster() { return 0; }
SPF_DEVICE void cluster_sync() {}
template <class T>
SPF_DEVICE T* of_block(T* shared, int) {
  return shared;
}
#endif

// Room for what warps and blocks leave for each other. Each reduction of a row has its own, written
// once: nobody has to wait until it has been read.
struct Exchange {
  static constexpr int REDUCTIONS = 3;
  float4 warps[REDUCTIONS][MAX_THREADS / WARP];
  float4 blocks[REDUCTIONS][MAX_BLOCKS];
};

template <class T>
SPF_DEVICE T over_warp(T mine) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    int words[sizeof(T) / sizeof(int)];
    memcpy(words, &mine, sizeof mine);
#pragma unroll
    for (int& word : words) word = __shfl_xor_sync(0xffffffff, word, lanes);
    T other;
    memcpy(&other, words, sizeof other);
    mine = T::combine(mine, other);
  }
  return mine;
}

// T: 4-byte members, at most 16 bytes; T() is neutral, T::combine commutes. Called once a row for
// each REDUCTION, by all threads of the cluster.
template <int REDUCTION, class T>
SPF_DEVICE T over_row(T mine, Exchange& exchange) {
  static_assert(sizeof(T) <= sizeof(float4) && REDUCTION < Exchange::REDUCTIONS);
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  mine = over_warp(mine);
  if (lane == 0) memcpy(&exchange.warps[REDUCTION][threadIdx.x / WARP], &mine, sizeof mine);
  __syncthreads();
  T block;
  if (lane < warps) memcpy(&block, &exchange.warps[REDUCTION][lane], sizeof block);
  block = over_warp(block);
  if (cluster_size() == 1) return block;

  float4* slots = exchange.blocks[REDUCTION];
  if (int(threadIdx.x) < cluster_size())
    memcpy(of_block(&slots[block_in_cluster()], threadIdx.x), &block, sizeof block);
  cluster_sync();
  T row;
  for (int i = 0; i < cluster_size(); i++) {
    T other;
    memcpy(&other, &slots[i], sizeof other);
    row = T::combine(row, other);
  }
  return row;
}

}  // namespace softprompt_fast::cuda
