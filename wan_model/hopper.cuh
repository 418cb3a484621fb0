// What the kernels of this folder share: the instructions of Hopper (sm_90a) that C++ has no words
// for.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// After the last one: for this block, its cluster and what copies.
__device__ __forceinline__ void barriers_are_there() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---------------------------------------------------------------------------------------- copies

// A box of a tensor of four dimensions, of which it may reach out: zeros there.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int a, int b, int c, int d,
                                         u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];"
      ::"r"(to), "l"(map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier) : "memory");
}

// -------------------------------------------------------------------------------------- products

// Rows along the sum, of 128 bytes swizzled by 128: 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 descriptor_128(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `left` of the groups that were committed are under way.
template <int left = 0>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 to_bf16(float a, float b) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  return both;
}

// Among 4 lanes: lane i gets, in v[j], what lane j had in v[i].
__device__ __forceinline__ void transpose(u32 (&v)[4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, lane & 1 ? v[i] : v[i + 1], 1);
    if (lane & 1) v[i] = got;
    else v[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 got = __shfl_xor_sync(~0u, lane & 2 ? v[i] : v[i + 2], 2);
    if (lane & 2) v[i] = got;
    else v[i + 2] = got;
  }
}

#define OPERANDS_4(kind, x, i) kind(x[i]), kind(x[i + 1]), kind(x[i + 2]), kind(x[i + 3])
#define OPERANDS_8(kind, x, i) OPERANDS_4(kind, x, i), OPERANDS_4(kind, x, i + 4)
#define OPERANDS_16(kind, x, i) OPERANDS_8(kind, x, i), OPERANDS_8(kind, x, i + 8)
#define OPERANDS_48(kind, x)                                                                  \
  OPERANDS_16(kind, x, 0), OPERANDS_16(kind, x, 16), OPERANDS_16(kind, x, 32)
#define OPERANDS_64(kind, x) OPERANDS_48(kind, x), OPERANDS_16(kind, x, 48)
#define OPERANDS_68(kind, x) OPERANDS_64(kind, x), OPERANDS_4(kind, x, 64)
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_48                                                                          \
  REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_64                                                                          \
  REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
