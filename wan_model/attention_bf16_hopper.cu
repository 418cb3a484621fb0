// Exact attention of bfloat16 on Hopper (sm_90a), head_dim 128: scores, exponentials and sums in
// float32, probabilities rounded to bfloat16 for the second product.
//
// q [B, L, H, 128], k and v [B, S, H, 128] as tensor maps (hopper_attention.py), out [B, L, H, 128]
// and the log-sum-exp [B, L, H], if there is a place for it.
//
// Three groups of four warps, of 64 queries each, share the keys and values that a fourth group has
// TMA copy into a ring in shared memory, 128 keys or values a tile; two blocks of a cluster share
// them as well. While one group takes its exponentials the others have the tensor cores, and so has
// its own second product while the other half of its exponentials is taken. A thread's scores are
// where that product wants its probabilities: they stay in registers.
// Rows have 128 bytes, 64 channels, swizzled by 128 bytes: a tile is two panels of them.

#include "attention_bf16.cuh"

constexpr int GROUPS = 3;  // of 64 queries
constexpr float SLACK = 8.0f;  // log2 of how far a probability may exceed 1

// ------------------------------------------------------------------------------------ clusters

// At the barrier in the same place of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// All threads of both blocks.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Two blocks of a cluster take neighbouring tiles of queries of one head and copy each half of its
// keys and values into the shared memory of both: half as much is read from L2. The last tile of an
// odd number is alone: the other block of its cluster has that of the next head, or nothing to do.
struct Place {
  int head, tile;
  u32 rank;  // in the cluster
  bool is_pair;
};

__device__ __forceinline__ Place place_of_block(int num_tiles, int num_heads) {
  const int pairs = num_tiles / 2, cluster = blockIdx.x / 2, rank = blockIdx.x % 2;
  const int left = cluster - pairs * num_heads;
  if (left < 0) return {cluster / pairs, cluster % pairs * 2 + rank, (u32)rank, true};
  return {left * 2 + rank, num_tiles - 1, (u32)rank, false};
}

// ------------------------------------------------------------------------------ instructions

// 64 channels of 64 tokens, to the same place in both blocks of the cluster.
__device__ __forceinline__ void copy_to_both(u32 to, const TensorMap* map, int channel, int head,
                                             int token, int sample, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
      ::"r"(to), "l"(map), "r"(channel), "r"(head), "r"(token), "r"(sample), "r"(barrier),
        "h"((u16)3)
      : "memory");
}

// Of a thread's two rows (accumulators 4 j, 4 j + 1 and 4 j + 2, 4 j + 3): the highest score yet,
// times scale, once it lies SLACK above the last that was taken, and what sums must be multiplied
// by then. True if any row of the warp has another one.
__device__ __forceinline__ bool update_highest(const float (&s)[64], float scale,
                                               float (&highest)[2], float (&shrink)[2]) {
  bool changed = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most = s[2 * r];
#pragma unroll
    for (int j = 0; j < 16; j++) most = fmaxf(most, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float now = most * scale > highest[r] + SLACK ? most * scale : highest[r];
    shrink[r] = exp2_of(highest[r] - now);
    changed |= now != highest[r];
    highest[r] = now;
  }
  return __any_sync(~0u, changed);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128 * (GROUPS + 1), 1)
    exact_attention(const __grid_constant__ TensorMap q_map,
                    const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map, u16* __restrict__ out,
                    float* __restrict__ log_sum_exp, int num_queries, int num_keys,
                    int num_heads, int num_samples, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 queries = address(memory), tiles = queries + GROUPS * Q_BYTES;
  const u32 q_full = tiles + TILES * TILE_BYTES, full = q_full + 8, free = full + 8 * TILES;
  const int num_query_tiles = (num_queries + 64 * GROUPS - 1) / (64 * GROUPS);
  const Place place = place_of_block(num_query_tiles, num_samples * num_heads);
  const int sample = place.head / num_heads, head = place.head % num_heads;
  const int num_blocks = (num_keys + KEYS - 1) / KEYS;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    for (int i = 0; i < TILES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(free + 8 * i, 4 * GROUPS * (place.is_pair ? 2 : 1));
    }
    barriers_are_there();
  }
  cluster_sync();

  int tile = 0;  // in the ring
  if (sample >= num_samples) {
    // The other block of the cluster has the last tile of all.
  } else if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == GROUPS * 128) {
      barrier_expect(q_full, GROUPS * Q_BYTES);
      for (int i = 0; i < 2 * GROUPS; i++) {
        copy_box(queries + i * BOX_BYTES, &q_map, i % 2 * 64, head,
                 place.tile * GROUPS * 64 + i / 2 * 64, sample, q_full);
      }
      u32 parity = 1;
#pragma unroll 1
      for (int i = 0; i < 2 * num_blocks; i++) {  // keys, values, keys, values
        const TensorMap* map = i % 2 ? &v_map : &k_map;
        const u32 to = tiles + tile * TILE_BYTES, barrier = full + 8 * tile;
        barrier_wait(free + 8 * tile, parity);
        barrier_expect(barrier, TILE_BYTES);
#pragma unroll
        for (int box = 0; box < 4; box++) {
          const int half = box % 2, channel = box / 2 * 64, token = i / 2 * KEYS + half * 64;
          if (!place.is_pair) {
            copy_box(to + box * BOX_BYTES, map, channel, head, token, sample, barrier);
          } else if (half == place.rank) {
            copy_to_both(to + box * BOX_BYTES, map, channel, head, token, sample, barrier);
          }
        }
        if (++tile == TILES) tile = 0, parity ^= 1;
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const u64 q_at = descriptor_128(queries + group * Q_BYTES);
    const u64 k_at = descriptor_128(tiles), v_at = descriptor_across(tiles);
    float o[64], highest[2], total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.0f;
    highest[0] = highest[1] = __int_as_float(0xff800000);  // -infinity
    u32 parity = 0;
    const auto tile_is_read = [&] {
      if (lane == 0) barrier_arrive(free + 8 * tile);
      if (lane == 1 && place.is_pair) barrier_arrive_at(free + 8 * tile, place.rank ^ 1);
      if (++tile == TILES) tile = 0, parity ^= 1;
    };
    barrier_wait(q_full, 0);
#pragma unroll 1
    for (int i = 0; i < num_blocks; i++) {
      float s[64];
      const u64 keys = k_at + tile * (TILE_BYTES / 16);
      barrier_wait(full + 8 * tile, parity);
      scores(s, q_at, keys);
      tile_is_read();

      const int num_there = num_keys - i * KEYS;
      if (num_there < KEYS) {
#pragma unroll
        for (int j = 0; j < 64; j++) {
          if (j / 4 * 8 + lane % 4 * 2 + j % 2 >= num_there) s[j] = __int_as_float(0xff800000);
        }
      }
      float shrink[2];
      if (update_highest(s, scale, highest, shrink)) {
        total[0] *= shrink[0];
        total[1] *= shrink[1];
#pragma unroll
        for (int j = 0; j < 64; j++) o[j] *= shrink[j / 2 % 2];
      }
      const u64 values = v_at + tile * (TILE_BYTES / 16);
      barrier_wait(full + 8 * tile, parity);
      attend(o, total, s, values,
             [&](float score, int r) { return fmaf(score, scale, -highest[r]); });
      tile_is_read();
    }

    const int row = (place.tile * GROUPS + group) * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (row + 8 * r >= num_queries) continue;
      const u64 at = ((u64)sample * num_queries + row + 8 * r) * num_heads + head;
      const float factor = 1.0f / total[r];
#pragma unroll
      for (int j = 0; j < 16; j++) {
        *(u32*)(out + at * 128 + 8 * j + lane % 4 * 2) =
            to_bf16(o[4 * j + 2 * r] * factor, o[4 * j + 2 * r + 1] * factor);
      }
      if (log_sum_exp && lane % 4 == 0) {
        log_sum_exp[at] = (highest[r] + log2f(total[r])) * 0.69314718f;  // log 2
      }
    }
  }
  // Until the other block has arrived at the last of this one's barriers.
  cluster_sync();
}
