#include "core/cpu/rows.h"
#include "turbo/cpu/codes.h"
#include "turbo/cpu/store_access.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::KVCORE_ISA {
namespace {

using namespace ::kvcore::KVCORE_ISA;

const OutputView& output(const DequantizeParams& p, int kv) { return kv == 0 ? p.k : p.v; }

// Element offset of an output row.
int64_t row_offset(const DequantizeParams& p, int64_t batch_idx, int64_t head_idx, int64_t token) {
  return ((batch_idx * p.store.kv_heads + head_idx) * p.kv_len + token) * p.store.head_dim;
}

int64_t first_row(const DequantizeParams& p, int64_t batch_idx) {
  return p.right_align ? p.kv_len - p.store.seq_lens[batch_idx] : 0;
}

void zero_rows(const DequantizeParams& p, int64_t batch_idx, int kv, int64_t head_idx,
               int64_t begin, int64_t end) {
  const OutputView& view = output(p, kv);
  const int64_t element_bytes = view.dtype == Dtype::kFloat32 ? 4 : 2;
  uint8_t* rows =
      static_cast<uint8_t*>(view.data) + row_offset(p, batch_idx, head_idx, begin) * element_bytes;
  memset(rows, 0, (end - begin) * p.store.head_dim * element_bytes);
}

}  // namespace

void dequantize_kernel(const DequantizeParams& p, int64_t batch_idx, int kv, int64_t head_idx,
                       int64_t page_idx) {
  alignas(64) int8_t codes[kMaxCodes];
  alignas(64) float row[kMaxHeadDim];
  const Store& s = p.store;
  const int head_dim = static_cast<int>(s.head_dim);
  const int64_t tokens = s.seq_lens[batch_idx] - page_idx * kPageTokens;
  const PoolBlock block = tokens >= kPageTokens
                              ? pool_block(s, batch_idx, kv, head_idx, page_idx)
                              : PoolBlock{tail_block(s, batch_idx, kv, head_idx, page_idx), 8};
  unpack_block(block.data, kv, block.bits, head_dim, codes);
  BlockHeader header;
  memcpy(&header, block.data, sizeof header);

  const int64_t head = (batch_idx * s.kv_heads + head_idx) * head_dim;
  const float* balance = kv == 0 ? p.calibration.k_balance : nullptr;
  const float* mean = kv == 0 ? p.calibration.k_mean : nullptr;
  const int64_t offset =
      row_offset(p, batch_idx, head_idx, first_row(p, batch_idx) + page_idx * kPageTokens);
  for (int64_t t = 0; t < kPageTokens && t < tokens; ++t) {
    for (int c = 0; c < head_dim; c += kLanes) {
      F32 x = load_s8(codes + t * head_dim + c) * splat(header.scale);
      if (balance != nullptr) x = x * load(balance + head + c);
      if (mean != nullptr) x = x + load(mean + head + c);
      store(row + c, x);
    }
    narrow_row(row, head_dim, output(p, kv), offset + t * head_dim);
  }
}

void dequantize_padding_kernel(const DequantizeParams& p, int64_t batch_idx, int kv,
                               int64_t head_idx) {
  const int64_t first = first_row(p, batch_idx), last = first + p.store.seq_lens[batch_idx];
  zero_rows(p, batch_idx, kv, head_idx, 0, first);
  zero_rows(p, batch_idx, kv, head_idx, last, p.kv_len);
}

}  // namespace kvcore::turbo::KVCORE_ISA
