// A sealed block's part of the weights of V's atoms. Its pairs are sorted by atom: every sum is a
// gather of the tokens' weights, by eight lanes or by a warp, in an order that only the number of
// the atom's pairs decides.
#pragma once

#include "core/cuda/scan.cuh"
#include "lexico/cuda/sealed.cuh"
#include "lexico/cuda/value_rows.cuh"

namespace kvcore::lexico {

template <class E, int kRows>
struct BlockValuesSmem {
  RowEntry<E, kRows> weights[kBlockTokens];  // of tokens, scales included
  int offsets[kValueThreads + 1];            // pairs of the atoms at hand
  int64_t wide_scratch[kValueWarps];
  int scratch[kValueWarps];
  float float_scratch[kValueWarps];
};

/// A pair in one register; zeros are a pair that adds nothing.
__device__ __forceinline__ unsigned load_pair(const uint16_t* tokens, const int8_t* coefficients,
                                              int i, bool valid) {
  return valid ? static_cast<unsigned>(tokens[i]) << 8 | static_cast<uint8_t>(coefficients[i]) : 0u;
}

/// Adds a pair; `largest` becomes that of the tokens.
template <class E, int kRows>
__device__ __forceinline__ void add_pair(const RowEntry<E, kRows>* weights, unsigned pair,
                                         float (&sum)[kRows], unsigned& largest) {
  const unsigned token = pair >> 8;
  largest = max(largest, token);
  const float coefficient = static_cast<float>(static_cast<int8_t>(pair & 0xff));
  const RowEntry<E, kRows> weight = weights[token & (kBlockTokens - 1)];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sum[r] = __fmaf_rn(coefficient, to_float(weight.x[r]), sum[r]);
  }
}

/// The sum of kLanes neighbouring lanes, written by the first of them.
template <int kLanes, int kRows>
__device__ __forceinline__ void write_atom(float (&sum)[kRows], float unit_weight, bool valid,
                                           float* out) {
  RowFloats<kRows> result;
#pragma unroll
  for (int r = 0; r < kRows; ++r) result.x[r] = warp_sum<kLanes>(sum[r]) * unit_weight;
  if (valid && threadIdx.x % kLanes == 0) *reinterpret_cast<RowFloats<kRows>*>(out) = result;
}

/// Atoms [first_atom, end_atom) of weights [v_atoms, kRows].
template <class E, int kRows>
__device__ inline void add_block(const ValueInput<kRows>& in, const Block& data, int first_atom,
                                 int end_atom, BlockValuesSmem<E, kRows>& smem, float* weights) {
  const int thread = static_cast<int>(threadIdx.x), own_atom = first_atom;
  const int64_t atoms = in.args.p.v_atoms;
  const VBlock block(data.data + in.unit.head_idx(in.args) * data.bytes, atoms);

  // Divided by a power of two above all scales, weights lie in [0, 1]: fp16 holds them.
  float largest_scale = 0.0f;
  for (int token = thread; token < kBlockTokens; token += kValueThreads) {
    const float scale = fabsf(to_float(Half{block.scale[token]}));
    if (is_finite(scale)) largest_scale = fmaxf(largest_scale, scale);
  }
  largest_scale = block_max<kValueThreads>(largest_scale, smem.float_scratch);
  const float unit_weight = power_above(largest_scale);
  const float inverse = inverse_of_power(unit_weight);
  float sums[kRows] = {};
  for (int token = thread; token < kBlockTokens; token += kValueThreads) {
    float scale = to_float(Half{block.scale[token]}) * inverse;
    if (!is_finite(scale)) {
      in.poison(token);
      scale = 0.0f;
    }
    const RowFloats<kRows> p = in.exponentials(token, sums);
    RowEntry<E, kRows> entry;
#pragma unroll
    for (int r = 0; r < kRows; ++r) entry.x[r] = from_float<E>(p.x[r] * scale);
    smem.weights[token] = entry;
  }
  in.block_sums(sums);
  in.write_sums(sums);

  const int64_t all = block.template count_pairs<kValueThreads>(0, atoms, smem.wide_scratch);
  const bool valid = block.fits(all, data.bytes);
  const uint16_t* tokens = block.tokens;
  const int8_t* factors = block.coefficients(all);
  const int64_t before =
      block.template count_pairs<kValueThreads>(0, first_atom, smem.wide_scratch);
  tokens += before;
  factors += before;
  unsigned largest = 0;
  for (; first_atom < end_atom; first_atom += kValueThreads) {
    const int count = min(kValueThreads, end_atom - first_atom);
    int total;
    const int pairs = valid && thread < count ? block.counts[first_atom + thread] : 0;
    const int offset = block_exclusive_sum<kValueThreads>(pairs, smem.scratch, total);
    smem.offsets[thread] = offset;
    if (thread == 0) smem.offsets[kValueThreads] = total;
    __syncthreads();
    // Pairs of the n-th of these atoms, none for the many.
    const auto light_end = [&](int n) {
      const int from = smem.offsets[n], to = smem.offsets[n + 1];
      return to - from > kHeavyPairs ? from : to;
    };
    float* const out = weights + int64_t{first_atom} * kRows;

    constexpr int kGroups = kValueThreads / kPairLanes;
    const int group = thread / kPairLanes, lane = thread % kPairLanes;
    for (int first = group; first < kValueThreads; first += kGroups * kPairBatch) {
      unsigned ahead[kPairBatch][2];
#pragma unroll
      for (int i = 0; i < kPairBatch; ++i) {
        // Behind the last atom there are no pairs.
        const int n = first + i * kGroups, at = smem.offsets[n] + lane, end = light_end(n);
        ahead[i][0] = load_pair(tokens, factors, at, at < end);
        ahead[i][1] = load_pair(tokens, factors, at + kPairLanes, at + kPairLanes < end);
      }
#pragma unroll
      for (int i = 0; i < kPairBatch; ++i) {
        const int n = first + i * kGroups, end = light_end(n);
        float sum[kRows] = {};
        add_pair(smem.weights, ahead[i][0], sum, largest);
        add_pair(smem.weights, ahead[i][1], sum, largest);
        for (int at = smem.offsets[n] + lane + 2 * kPairLanes; at < end; at += kPairLanes) {
          add_pair(smem.weights, load_pair(tokens, factors, at, true), sum, largest);
        }
        write_atom<kPairLanes>(sum, unit_weight, n < count, out + n * kRows);
      }
    }
    // After the zeros that their groups have written.
    __syncthreads();
    for (int n = thread / kWarpSize; n < count; n += kValueWarps) {
      const int from = smem.offsets[n], to = smem.offsets[n + 1];
      if (to - from <= kHeavyPairs) continue;
      float sum[kRows] = {};
#pragma unroll 4
      for (int at = from + thread % kWarpSize; at < to; at += kWarpSize) {
        add_pair(smem.weights, load_pair(tokens, factors, at, true), sum, largest);
      }
      write_atom<kWarpSize>(sum, unit_weight, true, out + n * kRows);
    }
    tokens += total;
    factors += total;
    __syncthreads();
  }
  if (!valid || largest >= kBlockTokens) {
    report_error(in.args.error_flags, kErrorCodes);
    in.poison_all();
  }
  __syncthreads();
  in.write_poison(weights + int64_t{own_atom} * kRows, 1);
}

}  // namespace kvcore::lexico
