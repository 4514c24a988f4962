// The first kernel of turbo_attention: stage 1 of every page of K and V, into B fragments.
//
// grid: one CTA of head_dim threads for each (page slot, kv head, K|V). Pages that no query sees
// are left out. K and V are read once here, and not again: the second kernel reads a byte where
// they have two or four.
#pragma once

#include "core/cuda/cu_seqlens.cuh"
#include "core/cuda/error_flags.cuh"
#include "core/cuda/rows.cuh"
#include "turbo/cuda/attention_args.cuh"
#include "turbo/cuda/page_codes.cuh"
#include "turbo/cuda/page_tile.cuh"

namespace kvcore::turbo {

template <class T>
__global__ void attention_quantize_kernel(const __grid_constant__ AttentionArgs args, DeviceRows k,
                                          DeviceRows v) {
  const AttentionParams& p = args.p;
  const int head_dim = static_cast<int>(p.head_dim);
  const int kv = static_cast<int>(blockIdx.x % 2);
  const int64_t slot = blockIdx.x / 2 % args.num_pages;
  const int64_t head = blockIdx.x / 2 / args.num_pages;
  if (args.is_valid != nullptr && *args.is_valid == 0) return;
  const Sequence s = sequence_of_slot<false>(args, 0, slot);
  const PageRange seen =
      s.q_len > 0 ? visible_pages(p.softmax, s.q_len, s.kv_len, 0, s.q_len - 1) : PageRange{0, 0};
  if (s.unit < seen.begin || s.unit >= seen.end) return;

  const DeviceRows rows = kv == 0 ? k : v;
  const int64_t token = s.unit * kPageTokens;
  const int64_t offset = rows.head(s.batch_idx, head) + (s.kv_begin + token) * rows.token_stride;
  const int num_tokens = static_cast<int>(min(int64_t{kPageTokens}, s.kv_len - token));
  const int64_t calibration_at = (s.batch_idx * p.kv_heads + head) * head_dim;
  const auto calibration_of = [&](const float* values) {
    return kv == 1 || values == nullptr ? nullptr : values + calibration_at;
  };
  const TileCalibration calibration(calibration_of(p.calibration.k_mean),
                                    calibration_of(p.calibration.k_balance));
  const TilePlace place = tile_place();
  RowTile tile;
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
#pragma unroll
    for (int j = 0; j < kTileChannels; ++j) tile.x[i][j] = 0.0f;
    if (place.token() + i < num_tokens) {
      load_channels<T>(rows, offset + (place.token() + i) * rows.token_stride, place.channel(),
                       tile.x[i]);
      calibration.apply(tile.x[i]);
    }
  }
  const Magnitude magnitude = page_magnitude(tile, head_dim, 0);
  const bool is_finite = magnitude.first_nonfinite == kPageTokens;
  const float scale = is_finite ? code_scale(magnitude.amax) : quiet_nan();
  CodeTile codes = is_finite ? quantize_tile(tile, scale) : CodeTile{};

  uint8_t* const page = args.pages + (head * args.num_pages + slot) * prefill_page_bytes(head_dim);
  if (threadIdx.x == 0) {
    reinterpret_cast<float*>(page + prefill_scales_offset(head_dim))[kv] = scale;
  }
  if (kv == 1) codes = transpose(codes);
#pragma unroll
  for (int i = 0; i < kTileTokens; ++i) {
    const int at =
        kv == 0 ? k_fragment_offset(place.token() + i, place.channel())
                : v_fragment_offset(place.token() + i / 4 * 4, place.channel() + i % 4, head_dim);
    *reinterpret_cast<uint32_t*>(page + at) = codes.word[i];
  }
}

/// Whether cu_seqlens rise from 0 to the number of tokens. One CTA: the other kernels' CTAs could
/// not tell on their own.
template <int kThreads>
__global__ void check_cu_seqlens_kernel(const __grid_constant__ AttentionArgs args) {
  const AttentionParams& p = args.p;
  const bool good = rises_to<kThreads>(p.cu_seqlens_q, p.num_seqs, p.q_len) &&
                    rises_to<kThreads>(p.cu_seqlens_k, p.num_seqs, p.kv_len);
  const bool is_valid = __syncthreads_or(!good) == 0;
  if (threadIdx.x == 0) {
    *args.is_valid = is_valid;
    if (!is_valid) report_error(args.error_flags, kErrorCuSeqlens);
  }
}

}  // namespace kvcore::turbo
