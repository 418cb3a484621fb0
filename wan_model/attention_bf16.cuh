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
