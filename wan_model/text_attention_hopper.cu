// Attention of bfloat16 to the few keys of a text on Hopper (sm_90a), head_dim 128: numbers as in
// attention_bf16_hopper.cu, and a score more by log_counts [B, L] for each key.
//
// q and out [B, N, H, 128], k and v [B, L, H, 128]; q, k, v as tensor maps (hopper_attention.py).
//
// It is bound by reading queries and writing out. A block of threads keeps the keys and values of
// one head, BLOCKS times 128 at most, and makes every num_shares-th tile of 64 queries of it: a
// fourth group has TMA copy them into a ring of SLOTS, and each of three groups of four warps takes
// every third. The blocks of all heads go through the tokens together: rows are read side by side.

#include "attention_bf16.cuh"

constexpr int GROUPS = 3;
constexpr int TEXT_BYTES = BLOCKS * TILE_BYTES;  // of keys, and of values

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    text_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const float* __restrict__ log_counts,
                   u16* __restrict__ out, int num_queries, int num_keys, int num_heads,
                   int num_shares, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 keys = address(memory), values = keys + TEXT_BYTES, slots = values + TEXT_BYTES;
  float* const counts = (float*)(memory + 2 * TEXT_BYTES + SLOTS * Q_BYTES);
  const u32 text_full = address(counts + BLOCKS * KEYS), full = text_full + 8;
  const u32 free = full + 8 * SLOTS;
  const int share = blockIdx.x % num_shares;
  const int sample = blockIdx.x / num_shares / num_heads;
  const int head = blockIdx.x / num_shares % num_heads;
  const int num_tiles = (num_queries + 63) / 64;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(text_full, 1);
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(free + 8 * i, 4);
    }
    barriers_are_there();
  }
  if (threadIdx.x < BLOCKS * KEYS) {  // log2, and no weight for what is not there
    const int key = threadIdx.x;
    counts[key] = key < num_keys ? log_counts[(u64)sample * num_keys + key] * 1.44269504f
                                 : __int_as_float(0xff800000);
  }
  __syncthreads();

  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == GROUPS * 128) {
      barrier_expect(text_full, 2 * TEXT_BYTES);
      for (int i = 0; i < 4 * BLOCKS; i++) {
        const int to = i * BOX_BYTES, channel = i / 2 % 2 * 64, token = i / 4 * KEYS + i % 2 * 64;
        copy_box(keys + to, &k_map, channel, head, token, sample, text_full);
        copy_box(values + to, &v_map, channel, head, token, sample, text_full);
      }
      int slot = 0;
      u32 parity = 1;
#pragma unroll 1
      for (int tile = share; tile < num_tiles; tile += num_shares) {
        const u32 to = slots + slot * Q_BYTES, barrier = full + 8 * slot;
        barrier_wait(free + 8 * slot, parity);
        barrier_expect(barrier, Q_BYTES);
        copy_box(to, &q_map, 0, head, tile * 64, sample, barrier);
        copy_box(to + BOX_BYTES, &q_map, 64, head, tile * 64, sample, barrier);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const u64 q_at = descriptor_128(slots), k_at = descriptor_128(keys);
    const u64 v_at = descriptor_across(values);
    const float* const own_counts = counts + lane % 4 * 2;
    int slot = group;
    u32 parity = 0;
    barrier_wait(text_full, 0);
#pragma unroll 1
    for (int tile = share + group * num_shares; tile < num_tiles; tile += GROUPS * num_shares) {
      float o[64], highest[2], total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 64; i++) o[i] = 0.0f;
      highest[0] = highest[1] = __int_as_float(0xff800000);
      barrier_wait(full + 8 * slot, parity);
#pragma unroll 1
      for (int block = 0; block < BLOCKS; block++) {
        float s[64];
        scores(s, q_at + slot * (Q_BYTES / 16), k_at + block * (TILE_BYTES / 16));
        if (block == BLOCKS - 1 && lane == 0) barrier_arrive(free + 8 * slot);

        // Of a thread's two rows: accumulators 4 j, 4 j + 1 and 4 j + 2, 4 j + 3.
        float most[2] = {highest[0], highest[1]};
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float2 count = *(const float2*)(own_counts + block * KEYS + 8 * j);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            float& a = s[4 * j + 2 * r];
            float& b = s[4 * j + 2 * r + 1];
            a = fmaf(a, scale, count.x);
            b = fmaf(b, scale, count.y);
            most[r] = fmaxf(most[r], fmaxf(a, b));
          }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
          most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
          most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
          if (block > 0) {
            const float shrink = exp2_of(highest[r] - most[r]);
            total[r] *= shrink;
#pragma unroll
            for (int i = 0; i < 32; i++) o[i / 2 * 4 + 2 * r + i % 2] *= shrink;
          }
          highest[r] = most[r];
        }
        attend(o, total, s, v_at + block * (TILE_BYTES / 16),
               [&](float score, int r) { return score - highest[r]; });
      }
      slot += GROUPS;
      if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;

      const int row = tile * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        const float factor = 1.0f / total[r];
        const u64 at = ((u64)sample * num_queries + row + 8 * r) * num_heads + head;
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
          u32 v[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            v[i] = to_bf16(o[4 * (j + i) + 2 * r] * factor, o[4 * (j + i) + 2 * r + 1] * factor);
          }
          transpose(v, lane);
          if (row + 8 * r < num_queries) {
            *(uint4*)(out + at * 128 + 8 * j + lane % 4 * 8) = make_uint4(v[0], v[1], v[2], v[3]);
          }
        }
      }
    }
  }
}
