// The inner loops of a design for the early-fused encoder on Hopper GPUs, complete enough for the compiler to say what
// a row costs. Nothing launches this file: `python -m bench gpu_design` compiles it and counts.
//
// One block serves candidates of one request, seven at a time. Sizes are the published ones: 100 actions padded to 112
// (seven tiles of 16 rows, one a warp), 96 numbers, 32 hidden units, the 10 newest actions read. All norms' means are
// folded out of what leads into the first norm and their gains into what follows, as in kernels/encoder.py.
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int kTiles = 12;        // of eight numbers in a token
constexpr int kSteps = 7;         // of sixteen actions in a sequence
constexpr int kHidden = 4;        // tiles of eight hidden units
constexpr int kStride = 104;      // bf16 between rows in shared memory: 13 x 16 bytes, so that eight rows meet no bank twice
constexpr int kSequence = 112;

__device__ __forceinline__ uint32_t in_shared(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from));
}

__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from));
}

__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" :: "r"(to), "r"(a), "r"(b), "r"(c), "r"(d));
}

__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ __forceinline__ uint32_t pack_positive(float low, float high) {
  uint32_t out;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ __forceinline__ uint32_t scaled(uint32_t pair, uint32_t by) {
  uint32_t out;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(by));
  return out;
}

__device__ __forceinline__ float reciprocal(float value) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
}

__device__ __forceinline__ float inverse_root(float value) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
}

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// A row lies in the four lanes of a quad.
__device__ __forceinline__ float over_quad(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ __forceinline__ float highest_of_quad(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

struct Shared {
  __nv_bfloat16 values[kSequence * kStride];       // the request's, with eight columns of ones: the mixture's denominators
  __nv_bfloat16 encoded[7][kSequence * kStride];   // layer 1's outputs, a candidate each
  __nv_bfloat16 hidden1[96 * 40], out1[32 * kStride];
  uint2 weights[7][kSteps * 4];                    // what a candidate multiplies each action's exponentials with, bf16
  float2 constant[7][kTiles * 4];                  // what a candidate adds to each of its rows
  float2 hidden1_bias[kHidden * 4], out1_bias[kTiles * 4], gain1[kTiles * 4];
  float2 present[14 * 4];                          // 0, or -infinity where there is no action
};

// Layer 1 of kAtOnce candidates, sixteen actions a warp: `exponentials` and `tokens` stay in registers for the whole request.
template <int kAtOnce>
__global__ void __launch_bounds__(224, kAtOnce == 1 ? 2 : 1)
layer1(const uint4* __restrict__ request_exponentials, const uint32_t* __restrict__ request_tokens, int candidates, float epsilon) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  uint4 exponentials[kSteps];
  uint32_t tokens[8][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) exponentials[step] = request_exponentials[(blockIdx.x * 49 + warp * 7 + step) * 32 + lane];
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) tokens[tile][half] = request_tokens[((blockIdx.x * 7 + warp) * 16 + tile * 2 + half) * 32 + lane];
  // Of `ldmatrix ... .trans` over rows of k: which row and eighth this lane points at.
  const int row = lane % 16, eighth = lane / 16 * 8;
  const uint32_t values = in_shared(&shared.values[row * kStride + eighth]);
  const uint32_t into_hidden = in_shared(&shared.hidden1[row * 40 + eighth]), from_hidden = in_shared(&shared.out1[row * kStride + eighth]);
  __syncthreads();
#pragma unroll 1
  for (int first = 0; first < candidates; first += kAtOnce) {
    float x[kAtOnce][kTiles + 1][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[kAtOnce][4];
#pragma unroll
      for (int one = 0; one < kAtOnce; ++one) {
        const uint2 by = shared.weights[first + one][step * 4 + t];
        left[one][0] = scaled(exponentials[step].x, by.x), left[one][1] = scaled(exponentials[step].y, by.x);
        left[one][2] = scaled(exponentials[step].z, by.y), left[one][3] = scaled(exponentials[step].w, by.y);
      }
#pragma unroll
      for (int pair = 0; pair < 7; ++pair) {
        uint32_t right[4];
        load_transposed(right, values + (step * 16 * kStride + pair * 16) * 2);
#pragma unroll
        for (int one = 0; one < kAtOnce; ++one) {
          multiply(x[one][pair * 2], left[one], right[0], right[1]);
          if (pair < 6) multiply(x[one][pair * 2 + 1], left[one], right[2], right[3]);
        }
      }
    }
#pragma unroll
    for (int one = 0; one < kAtOnce; ++one) {
      float(&mine)[kTiles + 1][4] = x[one];
      // An absent action's exponentials are zeros, as is what its row becomes; nobody reads it.
      const float share[2] = {reciprocal(fmaxf(mine[kTiles][0], 1e-30f)), reciprocal(fmaxf(mine[kTiles][2], 1e-30f))};
      float square[2] = {0, 0};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float2 constant = shared.constant[first + one][tile * 4 + t];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float added[2] = {constant.x, constant.y};
          if (tile < 8) added[0] += low(tokens[tile][half]), added[1] += high(tokens[tile][half]);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float& value = mine[tile][half * 2 + k];
            value = fmaf(value, share[half], added[k]);
            square[half] = fmaf(value, value, square[half]);
          }
        }
      }
      float scale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[half] = inverse_root(fmaf(over_quad(square[half]), 1.0f / 96, epsilon));

      float hidden[kHidden][4] = {};
#pragma unroll
      for (int step = 0; step < 6; ++step) {
        const uint32_t left[4] = {pack(mine[step * 2][0], mine[step * 2][1]), pack(mine[step * 2][2], mine[step * 2][3]),
                                  pack(mine[step * 2 + 1][0], mine[step * 2 + 1][1]), pack(mine[step * 2 + 1][2], mine[step * 2 + 1][3])};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t right[4];
          load_transposed(right, into_hidden + (step * 16 * 40 + pair * 16) * 2);
          multiply(hidden[pair * 2], left, right[0], right[1]);
          multiply(hidden[pair * 2 + 1], left, right[2], right[3]);
        }
      }
      float y[kTiles][4];
      float sum[2] = {0, 0};
      square[0] = square[1] = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float2 bias = shared.out1_bias[tile * 4 + t], gain = shared.gain1[tile * 4 + t];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          y[tile][half * 2] = fmaf(mine[tile][half * 2] * scale[half], gain.x, bias.x);
          y[tile][half * 2 + 1] = fmaf(mine[tile][half * 2 + 1] * scale[half], gain.y, bias.y);
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t left[4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float2 bias = shared.hidden1_bias[(step * 2 + tile) * 4 + t];
#pragma unroll
          for (int half = 0; half < 2; ++half)
            left[tile * 2 + half] = pack_positive(fmaf(hidden[step * 2 + tile][half * 2], scale[half], bias.x),
                                                  fmaf(hidden[step * 2 + tile][half * 2 + 1], scale[half], bias.y));
        }
#pragma unroll
        for (int pair = 0; pair < 6; ++pair) {
          uint32_t right[4];
          load_transposed(right, from_hidden + (step * 16 * kStride + pair * 16) * 2);
          multiply(y[pair * 2], left, right[0], right[1]);
          multiply(y[pair * 2 + 1], left, right[2], right[3]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k / 2] += y[tile][k], square[k / 2] = fmaf(y[tile][k], y[tile][k], square[k / 2]);
      float moved[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float mean = over_quad(sum[half]) * (1.0f / 96);
        scale[half] = inverse_root(fmaf(over_quad(square[half]), 1.0f / 96, epsilon - mean * mean));
        moved[half] = -mean * scale[half];
      }
      const uint32_t to = in_shared(&shared.encoded[first + one][(warp * 16 + lane % 16) * kStride + lane / 16 * 8]);
#pragma unroll
      for (int pair = 0; pair < 6; ++pair) {
        uint32_t out[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float(&from)[4] = y[pair * 2 + k / 2];
          const int half = k % 2;
          out[k] = pack(fmaf(from[half * 2], scale[half], moved[half]), fmaf(from[half * 2 + 1], scale[half], moved[half]));
        }
        store_matrices(to + pair * 32, out[0], out[1], out[2], out[3]);
      }
    }
  }
}

// Layer 2's attention of one candidate by one warp: sixteen rows of which ten ask, over all 112 of layer 1.
__global__ void __launch_bounds__(224, 1) layer2_attention(const __nv_bfloat16* __restrict__ asking, __nv_bfloat16* read, int candidates) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  __shared__ __align__(16) __nv_bfloat16 mapped[80 * kStride], answers[80 * kStride];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  for (int i = threadIdx.x; i < 80 * kStride; i += blockDim.x) mapped[i] = asking[i];
  __syncthreads();
#pragma unroll 1
  for (int one = warp; one < candidates; one += 7) {
    const uint32_t left_at = in_shared(&mapped[(one % 7 * 10 + lane % 16) * kStride + lane / 16 * 8]);
    // Not transposed: rows of layer 1 are columns here. Four matrices: eight actions by 16 numbers, twice.
    const uint32_t rows_at = in_shared(&shared.encoded[one % 7][(lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8]);
    float scores[14][4] = {};
#pragma unroll
    for (int step = 0; step < 6; ++step) {
      uint32_t left[4];
      load_matrices(left, left_at + step * 32);
#pragma unroll
      for (int pair = 0; pair < 7; ++pair) {
        uint32_t right[4];
        load_matrices(right, rows_at + (pair * 16 * kStride + step * 16) * 2);
        multiply(scores[pair * 2], left, right[0], right[1]);
        multiply(scores[pair * 2 + 1], left, right[2], right[3]);
      }
    }
    float top[2] = {-1e30f, -1e30f}, whole[2] = {0, 0};
#pragma unroll
    for (int tile = 0; tile < 14; ++tile) {
      const float2 there = shared.present[tile * 4 + t];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        scores[tile][k] += k % 2 ? there.y : there.x;
        top[k / 2] = fmaxf(top[k / 2], scores[tile][k]);
      }
    }
    top[0] = highest_of_quad(top[0]), top[1] = highest_of_quad(top[1]);
#pragma unroll
    for (int tile = 0; tile < 14; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // the factor of log2(e) lies in the map that made `mapped`
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(scores[tile][k]) : "f"(scores[tile][k] - top[k / 2]));
        whole[k / 2] += scores[tile][k];
      }
    const float share[2] = {reciprocal(over_quad(whole[0])), reciprocal(over_quad(whole[1]))};
    const uint32_t across_at = in_shared(&shared.encoded[one % 7][(lane % 16) * kStride + lane / 16 * 8]);
    float found[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t left[4] = {pack(scores[step * 2][0], scores[step * 2][1]), pack(scores[step * 2][2], scores[step * 2][3]),
                                pack(scores[step * 2 + 1][0], scores[step * 2 + 1][1]), pack(scores[step * 2 + 1][2], scores[step * 2 + 1][3])};
#pragma unroll
      for (int pair = 0; pair < 6; ++pair) {
        uint32_t right[4];
        load_transposed(right, across_at + (step * 16 * kStride + pair * 16) * 2);
        multiply(found[pair * 2], left, right[0], right[1]);
        multiply(found[pair * 2 + 1], left, right[2], right[3]);
      }
    }
    // Rows 10 to 15 are the next candidate's; its warp writes them later, in the design after a barrier of this warp's pair.
    const uint32_t to = in_shared(&answers[(one % 7 * 10 + lane % 16) * kStride + lane / 16 * 8]);
#pragma unroll
    for (int pair = 0; pair < 6; ++pair)
      store_matrices(to + pair * 32, pack(found[pair * 2][0] * share[0], found[pair * 2][1] * share[0]),
                     pack(found[pair * 2][2] * share[1], found[pair * 2][3] * share[1]),
                     pack(found[pair * 2 + 1][0] * share[0], found[pair * 2 + 1][1] * share[0]),
                     pack(found[pair * 2 + 1][2] * share[1], found[pair * 2 + 1][3] * share[1]));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 80 * kStride; i += blockDim.x) read[i] = answers[i];
}

// One product of sixteen packed rows (of seven candidates' seventy) by a weight of 96 x kWide; weights lie in global memory in
// the order in which lanes read them, 16 bytes each, and stay in the first-level cache.
template <int kSteps_, int kWide>
__device__ __forceinline__ void by_weight(float (&out)[kWide][4], const uint32_t (&left)[kSteps_][4], const uint4* __restrict__ weight, int lane) {
#pragma unroll
  for (int step = 0; step < kSteps_; ++step)
#pragma unroll
    for (int pair = 0; pair < kWide / 2; ++pair) {
      const uint4 right = __ldg(weight + (step * (kWide / 2) + pair) * 32 + lane);
      multiply(out[pair * 2], left[step], right.x, right.y);
      multiply(out[pair * 2 + 1], left[step], right.z, right.w);
    }
}

// Layer 2's query map of sixteen packed rows.
__global__ void __launch_bounds__(224, 1) layer2_queries(const uint4* __restrict__ weight, const float2* __restrict__ bias, const int* __restrict__ rows, int tiles) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  __shared__ __align__(16) __nv_bfloat16 mapped[80 * kStride];
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll 1
  for (int tile = threadIdx.x / 32; tile < tiles; tile += 7) {
    const uint32_t from = in_shared(&shared.encoded[0][rows[tile * 16 + lane % 16] * kStride + lane / 16 * 8]);
    uint32_t left[6][4];
#pragma unroll
    for (int step = 0; step < 6; ++step) load_matrices(left[step], from + step * 32);
    float out[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 b = bias[n * 4 + t];
      out[n][0] = out[n][2] = b.x, out[n][1] = out[n][3] = b.y;
    }
    by_weight<6, kTiles>(out, left, weight, lane);
    const uint32_t to = in_shared(&mapped[(tile * 16 + lane % 16) * kStride + lane / 16 * 8]);
#pragma unroll
    for (int pair = 0; pair < 6; ++pair)
      store_matrices(to + pair * 32, pack(out[pair * 2][0], out[pair * 2][1]), pack(out[pair * 2][2], out[pair * 2][3]),
                     pack(out[pair * 2 + 1][0], out[pair * 2 + 1][1]), pack(out[pair * 2 + 1][2], out[pair * 2 + 1][3]));
  }
  __syncthreads();
  if (mapped[threadIdx.x] == __nv_bfloat16(0.0f)) shared.encoded[0][0] = mapped[threadIdx.x];
}

// What follows layer 2's attention, of sixteen packed rows: value map, residual, norm, feed-forward, norm, out to global memory.
__global__ void __launch_bounds__(224, 1)
layer2_tail(const uint4* __restrict__ value_out, const uint4* __restrict__ into_hidden, const uint4* __restrict__ from_hidden,
            const float4* __restrict__ vectors, const int* __restrict__ rows, float2* encoded, int tiles, float epsilon) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  __shared__ __align__(16) __nv_bfloat16 answers[80 * kStride];
  const int lane = threadIdx.x % 32, t = lane % 4;
  answers[threadIdx.x] = __float2bfloat16(epsilon);
  __syncthreads();
#pragma unroll 1
  for (int tile = threadIdx.x / 32; tile < tiles; tile += 7) {
    const uint32_t from = in_shared(&answers[(tile * 16 + lane % 16) * kStride + lane / 16 * 8]);
    uint32_t left[6][4];
#pragma unroll
    for (int step = 0; step < 6; ++step) load_matrices(left[step], from + step * 32);
    float y[kTiles][4];
    const int asked = rows[tile * 16 + lane / 4], asked8 = rows[tile * 16 + lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {  // layer 1's gain and what layer 2 adds to every row; the residual is layer 1's own output
      const float4 v = vectors[n * 4 + t];
      const uint32_t one = *reinterpret_cast<const uint32_t*>(&shared.encoded[0][asked * kStride + n * 8 + t * 2]);
      const uint32_t other = *reinterpret_cast<const uint32_t*>(&shared.encoded[0][asked8 * kStride + n * 8 + t * 2]);
      y[n][0] = fmaf(low(one), v.x, v.z), y[n][1] = fmaf(high(one), v.y, v.w);
      y[n][2] = fmaf(low(other), v.x, v.z), y[n][3] = fmaf(high(other), v.y, v.w);
    }
    by_weight<6, kTiles>(y, left, value_out, lane);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      float sum[2] = {0, 0}, square[2] = {0, 0}, scale[2], moved[2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k / 2] += y[n][k], square[k / 2] = fmaf(y[n][k], y[n][k], square[k / 2]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float mean = over_quad(sum[half]) * (1.0f / 96);
        scale[half] = inverse_root(fmaf(over_quad(square[half]), 1.0f / 96, epsilon - mean * mean));
        moved[half] = -mean * scale[half];
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 v = vectors[(round + 1) * 48 + n * 4 + t];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          y[n][k] = fmaf(fmaf(y[n][k], scale[k / 2], moved[k / 2]), k % 2 ? v.y : v.x, k % 2 ? v.w : v.z);
      }
      if (round == 0) {
        float hidden[kHidden][4];
#pragma unroll
        for (int n = 0; n < kHidden; ++n) {
          const float4 v = vectors[144 + n * 4 + t];
          hidden[n][0] = hidden[n][2] = v.x, hidden[n][1] = hidden[n][3] = v.y;
        }
#pragma unroll
        for (int step = 0; step < 6; ++step) {
          left[step][0] = pack(y[step * 2][0], y[step * 2][1]), left[step][1] = pack(y[step * 2][2], y[step * 2][3]);
          left[step][2] = pack(y[step * 2 + 1][0], y[step * 2 + 1][1]), left[step][3] = pack(y[step * 2 + 1][2], y[step * 2 + 1][3]);
        }
        by_weight<6, kHidden>(hidden, left, into_hidden, lane);
        uint32_t inner[2][4];
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            inner[step][k] = pack_positive(hidden[step * 2 + k / 2][k % 2 * 2], hidden[step * 2 + k / 2][k % 2 * 2 + 1]);
        by_weight<2, kTiles>(y, inner, from_hidden, lane);
      }
    }
    const int out = (tile * 16 + lane / 4) * 48 + t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      encoded[out + n * 4] = make_float2(y[n][0], y[n][1]);
      encoded[out + 8 * 48 + n * 4] = make_float2(y[n][2], y[n][3]);
    }
  }
}

template __global__ void layer1<1>(const uint4*, const uint32_t*, int, float);
template __global__ void layer1<2>(const uint4*, const uint32_t*, int, float);
