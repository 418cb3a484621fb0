// 3 x 3 x 3 convolution of channels-last bfloat16 videos on Hopper (sm_90a), as an implicit GEMM.
//
// x [T + 2, H + 2 - 2 top, W, C], weights [OUT, 27, C], out [T, H, W, OUT]; C a multiple of 32.
// Zeros beyond the edges of x in H, if `top` is 1, and in W; none in time. Sums in float32.
//
// A block of threads makes tiles of 6 rows x 64 columns x N channels, one after another. Three
// groups of four warps own 2 rows each (two products of 64 x N x 16 at a time); a fourth group has
// TMA copy into two rings in shared memory: patches of the input (8 rows x 66 columns x 32 channels
// of one frame) and weights (3 taps x N x 32), zeros for what lies outside.
// Pixels and weights have 64 bytes and are swizzled by 64 bytes. The swizzle goes by the bits of an
// address in shared memory: the 9 taps of a patch read it from addresses shifted by whole pixels.
//
// N: 96 or 128 (then OUT is a multiple of 8), or 16. Rings of PATCHES and WEIGHTS: convolution.py.

#include "hopper.cuh"

constexpr int GROUPS = 3;  // of 2 image rows
constexpr int ROWS = 2 * GROUPS, COLS = 64, CHANNELS = 32;
constexpr int PIXEL = 2 * CHANNELS;  // bytes
constexpr int PATCH_ROW = (COLS + 2) * PIXEL;
constexpr int PATCH_BYTES = (ROWS + 2) * PATCH_ROW;
constexpr int TAP_BYTES = N * PIXEL;
constexpr int WEIGHT_BYTES = 3 * TAP_BYTES;
constexpr int SUMS = N / 2;  // of a thread, from a product
static_assert(PATCH_BYTES % 1024 == 0 && WEIGHT_BYTES % 1024 == 0 && TAP_BYTES % 512 == 0);
static_assert(PATCHES * PATCH_BYTES + WEIGHTS * WEIGHT_BYTES + 16 * (PATCHES + WEIGHTS) <= 232448);

// 32 channels of 3 taps, from channel `out` on.
__device__ __forceinline__ void copy_weights(u32 to, const TensorMap* map, int chunk, int out,
                                             int tap, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(map), "r"(chunk * CHANNELS), "r"(out), "r"(tap), "r"(barrier) : "memory");
}

// Rows of 64 bytes, swizzled by 64 bytes, 512 bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)32 << 32 | (u64)2 << 62;
}

#define PRODUCT(n, registers, a, b, add)                                                      \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\n"                                      \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, " a ", " b        \
  ", adds, 1, 1, 0, 0;\n}"

#if N == 16
#define OPERANDS(x) OPERANDS_8("+f", x, 0)
#define PRODUCT_N PRODUCT("16", REGISTERS_8, "%8", "%9", "%10")
#elif N == 96
#define OPERANDS(x) OPERANDS_48("+f", x)
#define PRODUCT_N PRODUCT("96", REGISTERS_48, "%48", "%49", "%50")
#elif N == 128
#define OPERANDS(x) OPERANDS_64("+f", x)
#define PRODUCT_N PRODUCT("128", REGISTERS_64, "%64", "%65", "%66")
#endif

// sum = (add ? sum : 0) + a b
__device__ __forceinline__ void product(float (&sum)[SUMS], u64 a, u64 b, u32 add) {
  asm volatile(PRODUCT_N : OPERANDS(sum) : "l"(a), "l"(b), "r"(add));
}

// The registers of a product that is under way must not be touched before it has ended.
__device__ __forceinline__ void hold(float (&sum)[SUMS]) {
  asm volatile("" : OPERANDS(sum)::"memory");
}

__device__ __forceinline__ float to_float(u16 bf16) {
  return __uint_as_float((u32)bf16 << 16);
}

// ------------------------------------------------------------------------------------- tiles

struct Tile {
  int block, frame, x, y;
};

__device__ __forceinline__ Tile tile_of(int i, int num_blocks, int num_frames, int width) {
  Tile tile;
  const int across = (width + COLS - 1) / COLS;
  tile.block = i % num_blocks, i /= num_blocks;
  tile.frame = i % num_frames, i /= num_frames;
  tile.x = i % across * COLS;
  tile.y = i / across * ROWS;
  return tile;
}

// Into `out` [frames, height, width, num_out]. A thread's sums 4 j + 2 r and the next one: channels
// 8 j + lane % 4 * 2 and the next one of column lane / 4 + 8 r of its warp's 16.
__device__ __forceinline__ void store(float (&sums)[2][SUMS], const Tile& tile, int group,
                                      const u16* bias, u16* out, int height, int width,
                                      int num_out) {
  const int lane = threadIdx.x % 32;
  const int x = tile.x + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int y = tile.y + 2 * group;
  const int first = tile.block * N;
  out += (((u64)tile.frame * height + y) * width + x) * num_out;
#if N == 16
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int channel = first + j / 2 * 8 + lane % 4 * 2 + j % 2;
    if (channel >= num_out) continue;
    const float shift = bias ? to_float(bias[channel]) : 0.0f;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (x + 8 * r < width && y + m < height) {
          out[((u64)m * width + 8 * r) * num_out + channel] =
              (u16)to_bf16(sums[m][j / 2 * 4 + 2 * r + j % 2] + shift, 0.0f);
        }
      }
    }
  }
#else
#pragma unroll
  for (int j = 0; j < N / 8; j += 4) {
    if (bias) {
#pragma unroll
      for (int l = 0; l < 8; l++) {
        const int channel = first + 8 * (j + l / 2) + lane % 4 * 2 + l % 2;
        const float shift = channel < num_out ? to_float(bias[channel]) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i / 2][4 * (j + l / 2) + i % 2 * 2 + l % 2] += shift;
      }
    }
    const int channel = first + 8 * j + lane % 4 * 8;  // after the transposition, and 7 more
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u32 v[4];
#pragma unroll
        for (int l = 0; l < 4; l++) {
          v[l] = to_bf16(sums[m][4 * (j + l) + 2 * r], sums[m][4 * (j + l) + 2 * r + 1]);
        }
        transpose(v, lane);
        if (x + 8 * r < width && y + m < height && channel < num_out) {
          *(uint4*)(out + ((u64)m * width + 8 * r) * num_out + channel) =
              make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }
#endif
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    convolution(const __grid_constant__ TensorMap x_map,
                const __grid_constant__ TensorMap weight_map, const u16* __restrict__ bias,
                u16* __restrict__ out, int num_tiles, int num_blocks, int num_chunks,
                int num_frames, int height, int width, int num_out, int top) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 patches = address(memory);
  const u32 taps = patches + PATCHES * PATCH_BYTES;
  const u32 p_full = taps + WEIGHTS * WEIGHT_BYTES, p_free = p_full + 8 * PATCHES;
  const u32 w_full = p_free + 8 * PATCHES, w_free = w_full + 8 * WEIGHTS;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int num_patches = 3 * num_chunks;
  if (threadIdx.x == 0) {
    for (int i = 0; i < PATCHES; i++) {
      barrier_init(p_full + 8 * i, 1);
      barrier_init(p_free + 8 * i, 4 * GROUPS);
    }
    for (int i = 0; i < WEIGHTS; i++) {
      barrier_init(w_full + 8 * i, 1);
      barrier_init(w_free + 8 * i, 4 * GROUPS);
    }
    barriers_are_there();
  }
  __syncthreads();

  int patch = 0, weight = 0;  // in the rings
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == GROUPS * 128) {
      u32 p_parity = 1, w_parity = 1;
#pragma unroll 1
      for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
        const Tile tile = tile_of(i, num_blocks, num_frames, width);
        int chunk = 0, dt = 0;
#pragma unroll 1
        for (int p = 0; p < num_patches; p++) {
          barrier_wait(p_free + 8 * patch, p_parity);
          barrier_expect(p_full + 8 * patch, PATCH_BYTES);
          copy_box(patches + patch * PATCH_BYTES, &x_map, chunk * CHANNELS, tile.x - 1,
                   tile.y - top, tile.frame + dt, p_full + 8 * patch);
          if (++patch == PATCHES) patch = 0, p_parity ^= 1;
#pragma unroll 1
          for (int dy = 0; dy < 3; dy++) {
            barrier_wait(w_free + 8 * weight, w_parity);
            barrier_expect(w_full + 8 * weight, WEIGHT_BYTES);
            copy_weights(taps + weight * WEIGHT_BYTES, &weight_map, chunk, tile.block * N,
                         9 * dt + 3 * dy, w_full + 8 * weight);
            if (++weight == WEIGHTS) weight = 0, w_parity ^= 1;
          }
          if (++chunk == num_chunks) chunk = 0, dt++;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int lane = threadIdx.x % 32;
    const u64 a_at = descriptor(patches + 2 * group * PATCH_ROW), b_at = descriptor(taps);
    u32 p_parity = 0, w_parity = 0;
    float sums[2][SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[0][i] = sums[1][i] = 0.0f;
#pragma unroll 1
    for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
#pragma unroll 1
      for (int p = 0; p < num_patches; p++) {
        barrier_wait(p_full + 8 * patch, p_parity);
        const u64 a = a_at + patch * (PATCH_BYTES / 16);
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          barrier_wait(w_full + 8 * weight, w_parity);
          const u64 b = b_at + weight * (WEIGHT_BYTES / 16);
          begin_products();
#pragma unroll
          for (int dx = 0; dx < 3; dx++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {  // 16 channels
              const u32 add = dy + dx + k > 0 ? 1 : p > 0;
#pragma unroll
              for (int m = 0; m < 2; m++) {
                const int offset = (m + dy) * PATCH_ROW + dx * PIXEL + k * 32;
                product(sums[m], a + offset / 16, b + (dx * TAP_BYTES + k * 32) / 16, add);
              }
            }
          }
          commit_products();
          // What the products before these read is free.
          wait_for_products<1>();
          if (lane == 0 && p + dy > 0) {
            barrier_arrive(w_free + 8 * (weight == 0 ? WEIGHTS - 1 : weight - 1));
            if (dy == 0) barrier_arrive(p_free + 8 * (patch == 0 ? PATCHES - 1 : patch - 1));
          }
          if (++weight == WEIGHTS) weight = 0, w_parity ^= 1;
        }
        if (++patch == PATCHES) patch = 0, p_parity ^= 1;
      }
      wait_for_products();
      hold(sums[0]);
      hold(sums[1]);
      if (lane == 0) {
        barrier_arrive(w_free + 8 * (weight == 0 ? WEIGHTS - 1 : weight - 1));
        barrier_arrive(p_free + 8 * (patch == 0 ? PATCHES - 1 : patch - 1));
      }
      store(sums, tile_of(i, num_blocks, num_frames, width), group, bias, out, height, width,
            num_out);
    }
  }
}
