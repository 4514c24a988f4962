#include "turbo/cpu/codes.h"
#include "turbo/cpu/store_access.h"
#include "turbo/cpu/store_kernels.h"

namespace kvcore::turbo::KVCORE_ISA {

void rewind_kernel(const RewindParams& p, int64_t batch_idx, int kv, int64_t head_idx,
                   int64_t page_idx) {
  alignas(64) int8_t codes[kMaxCodes];
  const int head_dim = static_cast<int>(p.store.head_dim);
  uint8_t* slot = tail_block(p.store, batch_idx, kv, head_idx, page_idx);
  BlockHeader header;
  memcpy(&header, slot, sizeof header);
  if (header.page_idx == page_idx) return;
  const PoolBlock block = pool_block(p.store, batch_idx, kv, head_idx, page_idx);
  memcpy(&header, block.data, sizeof header);
  unpack_block(block.data, kv, block.bits, head_dim, codes);
  pack_block(codes, kv, 8, head_dim, header.scale, static_cast<int32_t>(page_idx), slot);
}

}  // namespace kvcore::turbo::KVCORE_ISA
