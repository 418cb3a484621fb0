// What the exact attentions share: products of bfloat16 for head_dim 128.
//
// Tiles of 64 queries or 128 keys or values in shared memory: two panels of 64 channels, 128 bytes
// a row, swizzled by 128 bytes. A thread's scores are where the second product wants its
// probabilities: they stay in registers.
#pragma once

#include "hopper.cuh"

constexpr int KEYS = 128;
constexpr int BOX_BYTES = 64 * 128;  // 64 rows of a panel: what is copied in one go
constexpr int PANEL_BYTES = 2 * BOX_BYTES;
constexpr int TILE_BYTES = 2 * PANEL_BYTES;
constexpr int Q_BYTES = 2 * BOX_BYTES;  // of one group

// Rows across the sum (v): PANEL_BYTES from 64 channels to the next, 1024 from 8 keys to the next.
__device__ __forceinline__ u64 descriptor_across(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (u64)(PANEL_BYTES / 16) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

#define SCORES(add)                                                                           \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\n"                                        \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64                      \
  "}, %64, %65, add, 1, 1, 0, 0;\n}"

// s = q k^T, of 16 channels, and s += the next ones'.
__device__ __forceinline__ void first_scores(float (&s)[64], u64 q, u64 k) {
  asm volatile(SCORES("0") : OPERANDS_64("=f", s) : "l"(q), "l"(k));
}
__device__ __forceinline__ void add_scores(float (&s)[64], u64 q, u64 k) {
  asm volatile(SCORES("1") : OPERANDS_64("+f", s) : "l"(q), "l"(k));
}

// o += p v, of 16 keys.
__device__ __forceinline__ void add_values(float (&o)[64], const u32* p, u64 v) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
      : OPERANDS_64("+f", o) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// The registers of a product that is under way must not be touched before it has ended.
__device__ __forceinline__ void hold(float (&x)[64]) {
  asm volatile("" : OPERANDS_64("+f", x)::"memory");
}
__device__ __forceinline__ void hold(u32 (&x)[32]) {
  asm volatile("" : OPERANDS_16("+r", x, 0), OPERANDS_16("+r", x, 16)::"memory");
}

// ------------------------------------------------------------------------------------- a block

// s = q k^T, of 64 queries and 128 keys; both have been read when it returns.
__device__ __forceinline__ void scores(float (&s)[64], u64 q, u64 k) {
  begin_products();
  first_scores(s, q, k);
#pragma unroll
  for (int i = 1; i < 8; i++) {  // 16 channels
    add_scores(s, q + i / 4 * (BOX_BYTES / 16) + i % 4 * 2,
               k + i / 4 * (PANEL_BYTES / 16) + i % 4 * 2);
  }
  commit_products();
  wait_for_products();
  hold(s);
}

// o += p v and total += p, where p = 2^exponent(s, row) of a thread's two rows: accumulators 4 j,
// 4 j + 1 and 4 j + 2, 4 j + 3. The product begins when half of the probabilities are there.
template <typename Exponent>
__device__ __forceinline__ void attend(float (&o)[64], float (&total)[2], const float (&s)[64],
                                       u64 v, const Exponent& exponent) {
  u32 p[32];
  hold(o);
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int j = 16 * half; j < 16 * half + 16; j++) {
      const int r = j % 2;
      const float a = exp2_of(exponent(s[2 * j], r)), b = exp2_of(exponent(s[2 * j + 1], r));
      total[r] += a + b;
      p[j] = to_bf16(a, b);
    }
    begin_products();
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; i++) {  // 16 keys
      add_values(o, p + 4 * i, v + i * (2048 / 16));
    }
    commit_products();
  }
  wait_for_products();
  hold(p);
  hold(o);
}
