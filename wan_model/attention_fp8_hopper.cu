// The quantised attention on Hopper (sm_90a), of operands that quantised_attention_kernels.py lays
// out; shapes: see there.
//
// Three groups of four warps share the keys and values that a fourth group copies into shared
// memory: one read of them serves 192 queries. While one group takes its exponentials the others
// have the tensor cores. Per block of 128 keys, of 64 queries a group:
//   int32 scores = q k^T, started at the bits of 1.5 * 2^23, so that the sum's bits read as a
//   float32 are 1.5 * 2^23 + sum and need no conversion (|sum| <= 127^2 * 128 < 2^22);
//   p = 2^(scores scaled - highest + 8) in fp8, in the registers the second product reads: the keys
//   of the values are in another order, in each 16, so that no thread needs another's;
//   out += p v. The values have 8 more channels, 1 for every key there is: the sum of p comes with
//   the product. It is added up in float32, block after block: the fp8 products keep about 14 bits,
//   of which `out` over all keys makes do.
// The products with the values begin when a quarter of a block's probabilities are there. Sums are
// multiplied only when a warp has found a score that lies SLACK above the highest.

#include "hopper.cuh"

constexpr int GROUPS = 3;          // of 64 queries
constexpr int STAGES = 4;          // blocks of keys and values in flight
constexpr int Q_BYTES = 64 * 128;  // of one group
constexpr int K_BYTES = 128 * 128;
constexpr int V_BYTES = 136 * 128;
constexpr u32 MAGIC = 0x4B400000;
constexpr float MAGIC_FLOAT = 12582912.0f;
constexpr float PROBABILITY_BITS = 8.0f;
constexpr float SLACK = 0.75f;

// A copy whose end `barrier` notes.
__device__ __forceinline__ void copy(u32 to, const u8* from, u32 bytes, u32 barrier) {
  barrier_expect(barrier, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ u32 to_fp8(float a, float b, float c, float d) {
  u16 low, high;
  u32 all;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  asm("mov.b32 %0, {%1, %2};" : "=r"(all) : "h"(low), "h"(high));
  return all;
}

__device__ __forceinline__ void add_scores(u32 (&s)[64], u64 q, u64 k) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" REGISTERS_64 "}, %64, %65, add;\n}"
      : OPERANDS_64("+r", s) : "l"(q), "l"(k));
}

__device__ __forceinline__ void add_values(float (&o)[68], const u32* p, u64 v) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" REGISTERS_64
      ",%64,%65,%66,%67}, {%68,%69,%70,%71}, %72, add, 1, 1;\n}"
      : OPERANDS_68("+f", o) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// The registers of a product that is under way must not be touched before it has ended.
__device__ __forceinline__ void hold(u32 (&s)[64]) {
  asm volatile("" : OPERANDS_64("+r", s)::"memory");
}
__device__ __forceinline__ void hold(u32 (&p)[16]) {
  asm volatile("" : OPERANDS_16("+r", p, 0)::"memory");
}
__device__ __forceinline__ void hold(float (&o)[68]) {
  asm volatile("" : OPERANDS_68("+f", o)::"memory");
}

// ------------------------------------------------------------------------------------ a block

// Of a thread's two rows (accumulators 4 j, 4 j + 1 and 4 j + 2, 4 j + 3): updates the highest
// score of each, once one lies SLACK above it, and returns, in `fell`, the last one less the new.
__device__ __forceinline__ void find_highest(const u32 (&s)[64], const float (&scale)[2],
                                             float (&highest)[2], float (&fell)[2],
                                             float (&minus_offset)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most = __uint_as_float(s[2 * r]);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      most = fmaxf(most, fmaxf(__uint_as_float(s[4 * j + 2 * r]),
                               __uint_as_float(s[4 * j + 2 * r + 1])));
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float found = (most - MAGIC_FLOAT) * scale[r];
    const float now = found > highest[r] + SLACK ? found : highest[r];
    fell[r] = highest[r] - now;
    highest[r] = now;
    minus_offset[r] = -fmaf(MAGIC_FLOAT, scale[r], now - PROBABILITY_BITS);
  }
}

// Of 32 keys, the k-th of a block: scores -> p.
__device__ __forceinline__ void probabilities(const u32 (&s)[64], u32 (&p)[16], int k,
                                              const float (&scale)[2],
                                              const float (&minus_offset)[2]) {
  float e[16];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    int r = i / 2 % 2;
    e[i] = exp2_of(fmaf(__uint_as_float(s[16 * k + i]), scale[r], minus_offset[r]));
  }
  p[4 * k] = to_fp8(e[0], e[1], e[4], e[5]);
  p[4 * k + 1] = to_fp8(e[2], e[3], e[6], e[7]);
  p[4 * k + 2] = to_fp8(e[8], e[9], e[12], e[13]);
  p[4 * k + 3] = to_fp8(e[10], e[11], e[14], e[15]);
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    quantised_attention(const u8* __restrict__ q, const u8* __restrict__ k,
                        const u8* __restrict__ v, const float* __restrict__ q_scale,
                        const float* __restrict__ k_scale, const float* __restrict__ v_scale,
                        const float* __restrict__ v_mean, u16* __restrict__ out, int num_queries,
                        int padded_queries, int num_blocks, int num_heads, int head_dim) {
  extern __shared__ __align__(1024) u8 memory[];
  u8* const keys = memory + GROUPS * Q_BYTES;
  u8* const values = keys + STAGES * K_BYTES;
  const u32 q_full = address(values + STAGES * V_BYTES);
  const u32 k_full = q_full + 8, k_free = k_full + 8 * STAGES;
  const u32 v_full = k_free + 8 * STAGES, v_free = v_full + 8 * STAGES;
  const int head = blockIdx.y, group = threadIdx.x / 128;
  const int first_query = blockIdx.x * GROUPS * 64;
  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(k_free + 8 * i, 4 * GROUPS);
      barrier_init(v_free + 8 * i, 4 * GROUPS);
    }
    barriers_are_there();
  }
  __syncthreads();

  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == GROUPS * 128) {
      const int num_rows = min(GROUPS * 64, padded_queries - first_query);
      copy(address(memory), q + ((u64)head * padded_queries + first_query) * 128, num_rows * 128,
           q_full);
      k += (u64)head * num_blocks * K_BYTES;
      v += (u64)head * num_blocks * V_BYTES;
      int stage = 0;
      u32 parity = 1;
      for (int i = 0; i < num_blocks; i++) {
        barrier_wait(k_free + 8 * stage, parity);
        copy(address(keys) + stage * K_BYTES, k + (u64)i * K_BYTES, K_BYTES, k_full + 8 * stage);
        barrier_wait(v_free + 8 * stage, parity);
        copy(address(values) + stage * V_BYTES, v + (u64)i * V_BYTES, V_BYTES,
             v_full + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int lane = threadIdx.x % 32;
    const int row = first_query + threadIdx.x / 32 * 16 + lane / 4;  // and row + 8
    q_scale += (u64)head * padded_queries;
    k_scale += (u64)head * num_blocks;
    const float row_scale[2] = {row < padded_queries ? q_scale[row] : 0.0f,
                                row + 8 < padded_queries ? q_scale[row + 8] : 0.0f};
    float o[68], highest[2], total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 68; i++) o[i] = 0.0f;
    highest[0] = highest[1] = __int_as_float(0xff800000);  // -infinity
    const u64 q_at = descriptor_128(address(memory) + group * Q_BYTES);
    const u64 k_at = descriptor_128(address(keys)), v_at = descriptor_128(address(values));
    barrier_wait(q_full, 0);
    int stage = 0;
    u32 parity = 0;
    float block_scale = k_scale[0];
#pragma unroll 1
    for (int i = 0; i < num_blocks; i++) {
      u32 s[64], p[16];
#pragma unroll
      for (int j = 0; j < 64; j++) s[j] = MAGIC;
      barrier_wait(k_full + 8 * stage, parity);
      begin_products();
      hold(s);
#pragma unroll
      for (int j = 0; j < 4; j++)
        add_scores(s, q_at + 2 * j, k_at + stage * (K_BYTES / 16) + 2 * j);
      const float scale[2] = {row_scale[0] * block_scale, row_scale[1] * block_scale};
      block_scale = k_scale[min(i + 1, num_blocks - 1)];
      commit_products();
      wait_for_products();
      hold(s);
      if (lane == 0) barrier_arrive(k_free + 8 * stage);

      float fell[2], minus_offset[2];
      find_highest(s, scale, highest, fell, minus_offset);
      if (__any_sync(~0u, fell[0] != 0.0f || fell[1] != 0.0f)) {
        const float shrink[2] = {exp2_of(fell[0]), exp2_of(fell[1])};
        total[0] *= shrink[0];
        total[1] *= shrink[1];
#pragma unroll
        for (int j = 0; j < 64; j++) o[j] *= shrink[j / 2 % 2];
      }

      // The products of 32 keys are under way while the next probabilities are computed.
      probabilities(s, p, 0, scale, minus_offset);
      barrier_wait(v_full + 8 * stage, parity);
      hold(o);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (j > 0) probabilities(s, p, j, scale, minus_offset);
        begin_products();
        add_values(o, p + 4 * j, v_at + stage * (V_BYTES / 16) + 2 * j);
        commit_products();
      }
      wait_for_products();
      hold(p);
      hold(o);
      if (lane == 0) barrier_arrive(v_free + 8 * stage);
      total[0] += o[64];
      total[1] += o[66];
      o[64] = o[65] = o[66] = o[67] = 0.0f;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    v_scale += head * head_dim;
    v_mean += head * head_dim;
    const int sample = head / num_heads, own_head = head % num_heads;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const int channel = 8 * j + lane % 4 * 2;
      if (channel >= head_dim) continue;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (row + 8 * r >= num_queries) continue;
        const float a = o[4 * j + 2 * r] / total[r], b = o[4 * j + 2 * r + 1] / total[r];
        const u64 token = (u64)sample * num_queries + row + 8 * r;
        *(u32*)(out + (token * num_heads + own_head) * head_dim + channel) =
            to_bf16(fmaf(a, v_scale[channel], v_mean[channel]),
                    fmaf(b, v_scale[channel + 1], v_mean[channel + 1]));
      }
    }
  }
}
